"""Serves a model over HTTP as OpenAI's API does, and measures such a server. Needs the extra `serve`.

A request is read and checked (schemas), turned into the engine's requests (completions, chat), and its texts grow while
the worker's thread steps the engine (worker, choice). Everything else runs in one event loop.
"""
