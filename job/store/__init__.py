"""What is kept: sealed folders, folders and S3 buckets behind one interface, attempts and their fences, checkpoints.

In: files. Out: the same bytes, or an error that says what is wrong. It may not know what the files mean.
"""
