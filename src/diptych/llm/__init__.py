"""Language and vision-language models that answer in JSON: any OpenAI-compatible server (`client`), or a model in this
process (`local`), by transformers or by vLLM (`vllm_engine`), behind the same `ask` and `ask_many`. `model` opens any
of them, and puts many questions.

Beneath: `endpoint` and `vllm` (settings), `question` (what is asked), `schema` (the answer's form), `settle` (ask,
validate, one repair turn), `outcome` (what comes back, and its bill), `cache` (nothing is paid for twice), `transport`
(HTTP and its retries), `pace` (rate limits).
"""
