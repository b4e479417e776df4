"""What holds of every OpenAI-compatible server."""

SEEDS = 2**31  # servers take seeds of 31 bits
KEY_REFUSED = (401, 403)
RETRIED = (408, 409, 425, 429)  # and every 5xx
