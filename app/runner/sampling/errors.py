"""The failure of one row: it ends that row's sequence and no other."""


class RowError(Exception):
    """No token can be drawn for this row. The message is one sentence for the client."""

    is_request_fault = False


class NoTokenLeft(RowError):
    """The request's own parameters ban every token."""

    is_request_fault = True
