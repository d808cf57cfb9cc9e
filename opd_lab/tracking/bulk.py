"""Many metrics at once into a store that is a database.

MLflow makes an object of every metric and asks it many questions, which is most of what delivery costs. What is history
when it arrives needs none of that: it goes into the table as rows. The newest value of each metric goes through MLflow
itself, which has to keep it apart as the latest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric], tags: Sequence[RunTag]) -> None:
    """As `client.log_batch` of metrics in the order of their steps; the newest ones and the tags come last."""
    newest = {metric.key: metric for metric in metrics}
    older = [metric for metric in metrics if newest[metric.key] is not metric]
    left = list(newest.values()) if _inserted(client, run_id, older) else metrics
    client.log_batch(run_id, metrics=left, tags=tags, synchronous=True)


def _inserted(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> bool:
    """False where the store is no database, or has some of them already: MLflow knows which."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.dbmodels.models import SqlMetric
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import insert
    from sqlalchemy.exc import IntegrityError

    store = client._tracking_client.store
    if not isinstance(store, SqlAlchemyStore):
        return False
    rows = []
    for metric in metrics:
        is_nan, value = store.sanitize_metric_value(metric.value)
        row = {"run_uuid": run_id, "key": metric.key, "value": value, "is_nan": is_nan}
        rows.append(row | {"timestamp": metric.timestamp, "step": metric.step})
    try:
        with store.ManagedSessionMaker(read_only=False) as session:
            if rows:
                session.execute(insert(SqlMetric), rows)
    except MlflowException as error:
        if not isinstance(error.__cause__, IntegrityError):
            raise
        return False
    return True
