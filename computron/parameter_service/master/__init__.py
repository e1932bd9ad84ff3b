"""The master: which aggregator owns which blocks of which job, under which epoch and with which members.

`Master.handle(event, now)` returns orders and touches nothing else; `server` carries them out.
"""
