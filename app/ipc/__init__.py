"""The line between the two processes: typed messages, framing and the progress page. No pickle."""
