"""What a trained model is worth: held-out loss on the training mesh, text from a checkpoint on one device."""
