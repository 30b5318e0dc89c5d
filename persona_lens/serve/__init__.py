"""A live instrument: talk with a model while its traits are read and moved; a conversation with branches; a server."""
