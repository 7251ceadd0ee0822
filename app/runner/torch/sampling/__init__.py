"""`app.runner.sampling` ported to torch, for whole batches on a device. numpy defines, this follows."""
