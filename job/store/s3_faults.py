"""What an error of boto3 means: is it worth another attempt, and what is the user told."""

from __future__ import annotations

import ssl

from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)

NETWORK = (ClientError, BotoCoreError, Boto3Error, ConnectionError, TimeoutError, ssl.SSLError)
"""whatever a request can end with, beside what the local disk raises"""
ABSENT = {"NoSuchKey", "404"}
DENIED = {"AccessDenied", "403", "AllAccessDisabled"}
UNKNOWN = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed", "NotSignedUp"}
EXPIRED = DENIED | UNKNOWN | {"ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException", "RequestExpired"}
"""after these a fresh look at the credentials may help"""
SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage", "507"}
"""MinIO's, Ceph's and plain HTTP's names of it"""
PERMISSIONS = "s3:ListBucket, GetObject, PutObject, DeleteObject, AbortMultipartUpload"


def cause_of(error: Exception) -> Exception:
    """The error below the wrappers of the transfer manager. Raises it when it is a bug of ours."""
    while isinstance(error, (S3UploadFailedError, RetriesExceededError)):
        inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    if isinstance(error, ParamValidationError):
        raise error
    return error


def code_of(error: Exception) -> str:
    """S3's own name of the error; empty where the server did not say one."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def refusal(error: Exception, bucket: str, endpoint: str) -> str | None:
    """What is wrong and what to do, for errors that no waiting heals; None for the others."""
    code, operation = code_of(error), getattr(error, "operation_name", "a request")
    if isinstance(error, NoCredentialsError):
        return "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, CredentialRetrievalError):
        return f"the credentials cannot be had ({error}): correct the AWS_ variables or files"
    if code in UNKNOWN:
        named = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        return f"{endpoint} does not know these credentials ({code}): check {named}"
    if code in DENIED:
        return f"{endpoint} refuses {operation} ({code}): these credentials need {PERMISSIONS}"
    if code in EXPIRED:
        return f"the credentials have expired ({code}): renew them"
    if code in ("NoSuchBucket", "404"):
        return f"{endpoint} has no bucket {bucket}: create it, or correct --bucket"
    if code in ("InvalidBucketName", "PermanentRedirect", "IllegalLocationConstraintException"):
        return f"{endpoint} does not serve bucket {bucket} ({code}): check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"
    if code in SKEWED:
        return f"this machine's clock differs from that of {endpoint} ({code}): set it right"
    if code in FULL:
        return f"{endpoint} has no room left ({code}): delete something there, or use another store"
    if code == "NotImplemented":
        return (
            f"{endpoint} cannot do {operation} with a condition or with a checksum in the trailer, so what is stored"
            " there could not be trusted: use another store"
        )
    return None


def reason_of(error: Exception, endpoint: str) -> str:
    """The error in a few words, without addresses of objects."""
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError)):
        return f"{endpoint} cannot be reached"
    if isinstance(error, ReadTimeoutError):
        return f"{endpoint} fell silent"
    if isinstance(error, ClientError):
        message = error.response.get("Error", {}).get("Message", "")
        return f"{code_of(error)}: {message}".rstrip(": .")
    return type(error).__name__
