"""Kernels that compute the same bits as `arithmetic` in fewer passes. `choose` picks one; nothing else imports them."""
