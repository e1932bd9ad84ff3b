"""Why something is refused, as `Refused.code` and `Denied.code` say it, and the errors that agents raise for it."""

from __future__ import annotations

STALE_EPOCH = "stale_epoch"  # the master has reconfigured the job: wait for its placement
NOT_OWNER = "not_owner"  # the block is elsewhere: a `Moved` or a placement says where
BAD_TOKEN = "bad_token"  # not this job's secret
UNKNOWN_JOB = "unknown_job"
BAD_MESSAGE = "bad_message"  # it does not fit the job: a defect of the sender
QUOTA = "quota"  # the job may not have so much memory, or the aggregator has none left
DIFFERENT_JOB = "different_job"  # another job of that name has other tensors or another optimizer
FAILED = "failed"  # the aggregator could not do it: the message says why
