"""What `computron simulate` simulates if nothing is said: eight models of 13 GB on one device with room for three."""

MODELS = 8
MODEL_SIZE = "13GB"
MEMORY = "40GB"
BANDWIDTH = "25GB/s"
FRAME = "16MiB"
STEP_TIME = "50ms"
BATCH = 16

RATE = 4.0
CV = 1.0
ZIPF = 1.0
DURATION = "5min"

SLO = "2s"
MAX_WAIT = "30s"
