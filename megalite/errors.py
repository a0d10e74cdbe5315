"""The one error that is the user's: a value, the limit it broke, and the cure, in one line."""


class UserError(ValueError):
    """Bad input. `megalite` prints its text as one line and exits with code 2; any other exception is our bug."""
