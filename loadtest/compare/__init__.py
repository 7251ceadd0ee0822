"""`python -m loadtest compare`: Headwater beside other servers, the same weights, one machine, one client."""
