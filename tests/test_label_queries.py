from __future__ import annotations

import pytest

from tomocpt_stream.annotation_files import Wanted
from tomocpt_stream.errors import PortalError
from tomocpt_stream.label_queries import LabelQuery, read_query


def test_a_text_is_a_query() -> None:
    text = (
        'dataset=DS-10003,10004 run=TS_1* run="TS 2" object="cytosolic ribosome" diameter=250.5 '
        "ground-truth=yes ctf_corrected=unknown near=13.48 prefer=filtered,raw all=no test=5 test-seed=3 "
        "annotation_deposition=CZCDP-10358 method=manual shape=Point exclude=TS_9 "
        "missing=skip contrast=bright"
    )
    query = read_query(text)
    assert query == LabelQuery(
        dataset=("DS-10003", "10004"),
        run=("TS_1*", "TS 2"),
        object="cytosolic ribosome",
        diameter=250.5,
        ground_truth=True,
        ctf_corrected="unknown",
        near=13.48,
        prefer=("filtered", "raw"),
        test=5,
        test_seed=3,
        annotation_deposition="CZCDP-10358",
        method="manual",
        shape="Point",
        exclude=("TS_9",),
        missing="skip",
        contrast="bright",
    )
    scope = query.scope()
    assert (scope.datasets, scope.run_names) == ((10003, 10004), ("TS_1*", "TS 2"))
    assert query.conditions()["ctf_corrected"] == "unknown"
    assert query.wanted() == Wanted(
        object="cytosolic ribosome", ground_truth=True, method="manual", deposition=10358
    )
    assert read_query("dataset=1 diameter=9 annotation=AN-7,8").annotations() == {7, 8}


def test_files_of_truth_are_for_who_chooses_no_other() -> None:
    truth = ["a.star", "b.star"]
    assert read_query("dataset=10021 diameter=110", truth=truth).truth == ("a.star", "b.star")
    assert read_query("dataset=10021 diameter=110 truth=c.star", truth=truth).truth == ("c.star",)
    assert read_query("dataset=10021 diameter=110 object=rubisco", truth=truth).truth == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "without a diameter"),
        ("dataset=10003 object=ribosome", "the portal keeps no sizes of particles"),
        ("dataset=10003 object=ribosome diameter=0", "a diameter of 0"),
        ("dataset=10003 object=ribosome diameter=nan", "a diameter of nan"),
        ("dataset=10003 object=ribosome diameter=wide", "diameter=wide; expected a number"),
        ("dataset=10003 object=ribosome diameter=250 diameter=9", "diameter= twice"),
        ("dataset=10003 object=ribosome dimaeter=250", r"did you mean diameter=\?"),
        ("dataset=10003 object= diameter=250", "object= of nothing"),
        ("dataset=10003 ribosome diameter=250", "'ribosome'; expected KEY=VALUE"),
        ("dataset=10003 object='ribosome diameter=250", "No closing quotation"),
        ("dataset=10003, object=ribosome diameter=250", "list without gaps"),
        ("dataset=TM-3 object=ribosome diameter=250", "TM-3 as a dataset"),
        ("object=ribosome diameter=250", "no deposition, dataset, run or tomogram"),
        ("dataset=10003 diameter=250", "without a truth"),
        ("dataset=10003 diameter=250 object=a truth=b.star", "truth= together with object"),
        ("dataset=10003 diameter=250 object=a particle=b", "without truth="),
        ("dataset=10003 diameter=250 object=a all=yes near=10", "all=yes with near"),
        ("dataset=10003 diameter=250 object=a all=maybe", "yes or no"),
        ("dataset=10003 diameter=250 object=a near=-1", "near=-1"),
        ("dataset=10003 diameter=250 object=a prefer=sharp", "prefer='sharp'"),
        ("dataset=10003 diameter=250 object=a processing=sharp", "processing='sharp'"),
        ("dataset=10003 diameter=250 object=a contrast=grey", "contrast=grey"),
        ("dataset=10003 diameter=250 object=a shape=Mesh", "shape=Mesh"),
        ("dataset=10003 diameter=250 object=a missing=zero", "missing=zero"),
        ("dataset=10003 diameter=250 object=a meaning=all", "meaning=all"),
        ("dataset=10003 diameter=250 object=a test=-1", "test=-1"),
        ("dataset=10003 diameter=250 object=a test=1.5", "a whole number"),
        ("dataset=10003 diameter=250 annotation=TM-5", "the id 'TM-5'"),
        ("dataset=10003 diameter=250 object=a selection=s.json", "selection= together with dataset"),
    ],
)
def test_what_nothing_can_have_is_refused_before_anybody_is_asked(text: str, message: str) -> None:
    with pytest.raises(PortalError, match=message):
        read_query(text)


@pytest.mark.parametrize(
    "text",
    [
        "dataset=1 truth=https://me:SECRET@host/a.star",
        "diameter=9 dataset=1 trut=https://me:SECRET@host/a.star",
        "diameter=9 dataset=1 https://host/a.star?sig=SECRET",
        "diameter=9 dataset=1 truth=a.star,,https://host/a.star?sig=SECRET",
        "diameter=9 dataset=1 truth='https://host/a.star?sig=SECRET",
    ],
)
def test_what_is_secret_in_an_address_is_not_repeated(text: str) -> None:
    with pytest.raises(PortalError) as error:
        read_query(text)
    assert "https://host/a.star" in str(error.value)
    assert "SECRET" not in str(error.value)
