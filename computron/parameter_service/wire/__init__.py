"""How the processes of the Parameter Service talk: messages, frames, links, shared memory."""
