"""LangChain as a client: prints what a server answers, whole and streamed, as JSON.

    LLM_SERVER_ENVIRONMENT/bin/python tests/servers/langchain_client.py ADDRESS MODEL EDITS MESSAGE

The key is in OPENAI_API_KEY. Nothing of ours: the environment does not have it.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Ask twice."""
    from langchain_openai import ChatOpenAI

    address, model, edits, message = sys.argv[1:]
    chat = ChatOpenAI(
        model=model,
        base_url=address,
        max_tokens=8,
        temperature=0,
        max_retries=0,
        extra_body={"persona_lens": {"edits": edits}},
    )
    streamed = "".join(str(part.content) for part in chat.stream(message))
    print(json.dumps({"whole": chat.invoke(message).content, "streamed": streamed}))


if __name__ == "__main__":
    main()
