"""Requests in, responses out: OpenAI's routes and Computron's own, over aiohttp."""
