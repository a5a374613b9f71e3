"""The batch job behind the click entrypoint: stages, run folder, supervision. Imports `model`; never the other way
round."""
