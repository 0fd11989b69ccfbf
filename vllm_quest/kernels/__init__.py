"""The four operations of QUEST: `store`, `score_pages`, `select_pages`, `attend_pages`.

`operations` puts them together from a format, a scorer and a device. `reference` has in plain torch what
formats and scorers share; `cpu` and `triton` are the devices. Shapes are written with these letters:

    T   tokens that are stored         B   blocks of the cache
    R   decode rows (query tokens)     N   tokens per block (vLLM's block_size)
    Hq  query heads                    P   pages per block, N / page_size
    H   KV heads                       M   blocks per row of the block table
    D   head size                      K   pages read per (row, KV head), token_budget / page_size
"""
