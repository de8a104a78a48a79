"""What a checkpoint is: its files, and how it is listed, verified, read and removed. Nothing here knows of ranks.

A checkpoint is a folder `step-00000100/` that exists completely or not at all:

    rank-00000.safetensors  the fragments that rank 0 held, each under the key "kind/parameter/start"
    logits.safetensors      a few tokens, and the logits that the model gave them when it was saved
    index.json              parameter shapes, and for every fragment its file and length
    state.json              step, tokens, the stream's state, and what they depend on
    MANIFEST.json           bytes and sha256 of each of these, and of itself

Nothing in it is a pickle. format.py says what is in the JSON files, tensors.py reads the others, folder.py keeps the
folder of checkpoints, verify.py finds one that is whole. Saving and loading over ranks are in `pretrain/training/`.
"""
