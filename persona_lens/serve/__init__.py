"""The live instrument: a conversation with branches, and a server that answers steered and monitored."""
