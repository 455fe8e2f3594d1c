"""Files in object stores and on the Hub of Hugging Face, by URL: `s3://`, `gs://`, `az://`, `https://`, `hf://`.

Nothing of this room is loaded where no URL is used.
"""
