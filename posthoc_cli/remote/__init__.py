"""Files in object stores and on the Hugging Face Hub, by URL: `s3://`, `gs://`, `az://`, `hf://`.

Nothing of this room is imported where no URL is used.
"""
