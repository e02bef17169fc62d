"""The one exception that is meant for the person who runs the program."""


class UserError(Exception):
    """Something the user can mend: bad data, a contradicting option, a missing package or model.

    The message says what is wrong, where (file, row, column, option) and what to do. The command line prints it as
    it is, without a traceback, and exits with code 2.
    """
