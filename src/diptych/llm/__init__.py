"""Language and vision-language models that answer in JSON: any OpenAI-compatible server, or a model in this process.

`client` opens them and sends questions. `question` has messages, replies and outcomes; `answering` asks, validates and
repairs; `schema` has the form of an answer; `cache` stores replies. `endpoint`, `transport` and `pace` serve HTTP
endpoints; `local` runs a model by transformers, and `vllm` by vLLM.
"""
