"""What a layout does before it is rented: `verify` proves that it computes the numbers of one process."""
