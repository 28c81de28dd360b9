"""Language and vision-language models that answer in JSON: any OpenAI-compatible server (`client`), or a local
transformers model (`local`), behind the same `ask` and `ask_many`. `model` opens either, and puts many questions.

Beneath: `endpoint` (settings), `question` (what is asked), `schema` (the answer's form), `settle` (ask, validate, one
repair turn), `outcome` (what comes back, and its bill), `cache` (nothing is paid for twice), `transport` (HTTP and its
retries), `pace` (rate limits).
"""
