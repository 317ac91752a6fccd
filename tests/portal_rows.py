"""Small worlds for the stand-in of the portal: rows as its API has them."""

from __future__ import annotations

from typing import Any

Rows = dict[str, list[dict[str, Any]]]

BUCKET = "s3://cryoet-data-portal-public"
MIRROR = "https://files.cryoetdataportal.cziscience.com"

# The ids of the small world, by what they are.
OWN_TOMOGRAMS = 10310
ANNOTATIONS_ONLY = 10358
FIRST_DATASET = 10440
SECOND_DATASET = 10445
FINE, COARSE = 4.99, 10.012


def tomogram(
    number: int, run: dict[str, Any], spacing: dict[str, Any], alignment: int | None, **fields: Any
) -> dict[str, Any]:
    """Return a tomogram of a run as the importer writes it; sizes follow from the spacing unless given."""
    step = spacing["voxelSpacing"]
    shape = (
        {"sizeX": 630, "sizeY": 630, "sizeZ": 184}
        if step > 9
        else {"sizeX": 1260, "sizeY": 1264, "sizeZ": 368}
    )
    shape |= {key: fields.pop(key) for key in tuple(shape) if key in fields}
    folder = f"{run['datasetId']}/{run['name']}/Reconstructions/VoxelSpacing{step:.3f}"
    key = f"{folder}/Tomograms/{number}/{run['name']}"
    x, y, z = shape["sizeX"], shape["sizeY"], shape["sizeZ"]
    scales = [",".join(str(-(-n // 2**level)) for n in (x, y, z)) for level in range(3)]
    return {
        "id": number,
        "name": run["name"],
        "runId": run["id"],
        "depositionId": OWN_TOMOGRAMS,
        "alignmentId": alignment,
        "tomogramVoxelSpacingId": spacing["id"],
        "voxelSpacing": step,
        **shape,
        "processing": "raw",
        "reconstructionMethod": "WBP",
        "reconstructionSoftware": "AreTomo3",
        "s3OmezarrDir": f"{BUCKET}/{key}.zarr",
        "httpsOmezarrDir": f"{MIRROR}/{key}.zarr",
        "fileSizeOmezarr": round(4 * x * y * z * 8 / 7) * 1.0,
        "s3MrcFile": f"{BUCKET}/{key}.mrc",
        "httpsMrcFile": f"{MIRROR}/{key}.mrc",
        "fileSizeMrc": 4.0 * x * y * z + 1024,
        "scale0Dimensions": scales[0],
        "scale1Dimensions": scales[1],
        "scale2Dimensions": scales[2],
        "neuroglancerConfig": "{}",
        "lastModifiedDate": "2024-11-05",
        **fields,
    }


def _people(owner: str, number: int, start: int, *names: str) -> list[dict[str, Any]]:
    """Return the authors of something, stored last first."""
    people = [
        {
            "id": start + i,
            owner: number,
            "name": name,
            "authorListOrder": i + 1,
            "primaryAuthorStatus": True if i == 0 else None,
            "correspondingAuthorStatus": i == len(names) - 1,
            "orcid": f"0000-0002-1825-{start + i:04d}" if i == 0 else None,
        }
        for i, name in enumerate(names)
    ]
    return people[::-1]


def _annotation(number: int, run: int, spacing: int, deposition: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "runId": run,
        "tomogramVoxelSpacingId": spacing,
        "depositionId": deposition,
        "objectName": "cytosolic ribosome",
        "objectId": "GO:0022626",
        "objectCount": 3,
        "groundTruthStatus": None,
        "methodType": "automated",
        "annotationMethod": "template matching",
        **fields,
    }


def _file(
    number: int, shape: int, alignment: int | None, spacing: int, path: str, **fields: Any
) -> dict[str, Any]:
    return {
        "id": number,
        "annotationShapeId": shape,
        "alignmentId": alignment,
        "tomogramVoxelSpacingId": spacing,
        "format": path.rsplit(".", 1)[1],
        "s3Path": f"{BUCKET}/{path}",
        "httpsPath": f"{MIRROR}/{path}",
        "source": "dataset_author",
        **fields,
    }


def small_world() -> Rows:
    """Return three depositions, three datasets, five runs and eleven tomograms.

    10310 has tomograms and two datasets: 10440, whose runs have tomograms at 4.99 and 10.012 Å in several
    processings and on two alignments, and 10445, to which deposition 10320 has added a tomogram. 10358
    has annotations only: on both of these datasets. 10320 has a dataset of its own, 10450, with a
    tomogram that has no zarr.
    """
    runs: list[dict[str, Any]] = [
        {"id": 501, "name": "TS_1", "datasetId": FIRST_DATASET},
        {"id": 502, "name": "TS_2", "datasetId": FIRST_DATASET},
        {"id": 503, "name": "TS_10", "datasetId": FIRST_DATASET},
        {"id": 504, "name": "Position_7", "datasetId": SECOND_DATASET},
        {"id": 505, "name": "TS_1", "datasetId": 10450},
    ]
    for one in runs:
        folder = f"{one['datasetId']}/{one['name']}/"
        one |= {"s3Prefix": f"{BUCKET}/{folder}", "httpsPrefix": f"{MIRROR}/{folder}"}
    run = {one["id"]: one for one in runs}
    spacings: list[dict[str, Any]] = [
        {"id": 601, "runId": 501, "voxelSpacing": FINE},
        {"id": 602, "runId": 501, "voxelSpacing": COARSE},
        {"id": 603, "runId": 502, "voxelSpacing": COARSE},
        {"id": 604, "runId": 503, "voxelSpacing": COARSE},
        {"id": 605, "runId": 504, "voxelSpacing": 7.84},
        {"id": 606, "runId": 505, "voxelSpacing": 13.48},
    ]
    at = {one["id"]: one for one in spacings}
    alignments: list[dict[str, Any]] = [
        {"id": 701, "runId": 501, "depositionId": OWN_TOMOGRAMS, "isPortalStandard": True},
        {"id": 702, "runId": 501, "depositionId": OWN_TOMOGRAMS, "isPortalStandard": False},
        {"id": 703, "runId": 502, "depositionId": OWN_TOMOGRAMS, "isPortalStandard": None},
        {"id": 704, "runId": 503, "depositionId": OWN_TOMOGRAMS},
        {"id": 705, "runId": 504, "depositionId": OWN_TOMOGRAMS, "isPortalStandard": True},
    ]
    for alignment in alignments:
        alignment |= {"alignmentType": "GLOBAL", "alignmentMethod": "projection_matching"}
    tomograms = [
        tomogram(
            8001,
            run[501],
            at[601],
            701,
            processing="denoised",
            isVisualizationDefault=True,
            ctfCorrected=True,
            isAuthorSubmitted=True,
            isPortalStandard=False,
            processingSoftware="DenoisET",
        ),
        tomogram(
            8002, run[501], at[601], 701, processing="filtered", ctfCorrected=True, isAuthorSubmitted=True
        ),
        tomogram(
            8003, run[501], at[602], 701, processing="denoised", ctfCorrected=True, isPortalStandard=True
        ),
        tomogram(8004, run[501], at[602], 701, ctfCorrected=None, isPortalStandard=False),
        tomogram(8005, run[501], at[602], 702, reconstructionMethod="SART", ctfCorrected=False),
        tomogram(8006, run[502], at[603], 703, processing="filtered_even", isVisualizationDefault=False),
        tomogram(8007, run[502], at[603], 703, processing="filtered_odd"),
        # These two differ in nothing that a preference may go by.
        tomogram(8009, run[503], at[604], 704, reconstructionMethod="Fourier_Space"),
        tomogram(8008, run[503], at[604], 704, reconstructionMethod="Fourier_Space"),
        tomogram(
            8010,
            run[504],
            at[605],
            705,
            depositionId=10320,
            isAuthorSubmitted=False,
            sizeX=464,
            sizeY=480,
            sizeZ=200,
            publications="10.1101/2024.05.01.592000",
            lastModifiedDate="2025-02-17",
        ),
        tomogram(
            8011,
            run[505],
            at[606],
            None,
            depositionId=10320,
            s3OmezarrDir=None,
            httpsOmezarrDir=None,
            fileSizeOmezarr=None,
            name=None,
        ),
    ]
    return {
        "depositions": [
            {
                "id": OWN_TOMOGRAMS,
                "title": "Ribosomes in lysed cells",
                "tag": "lysate",
                "depositionPublications": "10.1038/s41592-023-01878-z, 10.1101/2023.03.28.534667",
            },
            {"id": 10320, "title": "Better alignments & others", "depositionPublications": None},
            {
                "id": ANNOTATIONS_ONLY,
                "title": "Automated picks",
                "depositionPublications": "10.1101/2025.01.01.000001",
            },
        ],
        "depositionTypes": [
            {"id": 1, "depositionId": OWN_TOMOGRAMS, "type": "dataset"},
            {"id": 2, "depositionId": OWN_TOMOGRAMS, "type": "tomogram"},
            {"id": 3, "depositionId": ANNOTATIONS_ONLY, "type": "annotation"},
            {"id": 4, "depositionId": 10320, "type": "tomogram"},
        ],
        "depositionAuthors": [
            *_people("depositionId", OWN_TOMOGRAMS, 10, "Ada Sánchez", "Bo Li", "Chris van der Meer"),
            *_people("depositionId", ANNOTATIONS_ONLY, 20, "Dana Ångström"),
            *_people("depositionId", 10320, 30, "Eve O'Neil", "Bo Li"),
        ],
        "datasets": [
            {
                "id": FIRST_DATASET,
                "depositionId": OWN_TOMOGRAMS,
                "title": "Lysate I",
                "sampleType": "cell",
                "organismName": "Escherichia coli",
                "datasetPublications": "10.1038/s41592-023-01878-z",
            },
            {"id": SECOND_DATASET, "depositionId": OWN_TOMOGRAMS, "title": "Lysate II", "sampleType": None},
            {"id": 10450, "depositionId": 10320, "title": "Old tomograms", "sampleType": "organelle"},
        ],
        "datasetAuthors": [
            *_people("datasetId", FIRST_DATASET, 40, "Ada Sánchez", "Bo Li"),
            *_people("datasetId", SECOND_DATASET, 50, "Bo Li"),
        ],
        "runs": runs,
        "tomogramVoxelSpacings": spacings,
        "alignments": alignments,
        "tomograms": tomograms,
        "tomogramAuthors": _people("tomogramId", 8001, 60, "Ada Sánchez", "Bo Li"),
        "annotations": [
            _annotation(901, 501, 602, OWN_TOMOGRAMS, groundTruthStatus=True, methodType="manual"),
            _annotation(902, 501, 602, ANNOTATIONS_ONLY, objectCount=2),
            _annotation(
                903, 501, 602, ANNOTATIONS_ONLY, objectName="membrane", objectId="GO:0016020", objectCount=1
            ),
            _annotation(904, 504, 605, ANNOTATIONS_ONLY, objectCount=4, groundTruthStatus=False),
            _annotation(
                905,
                501,
                602,
                OWN_TOMOGRAMS,
                objectName="actin filament",
                objectId="GO:0005884",
                methodType="hybrid",
            ),
        ],
        "annotationAuthors": [
            *_people("annotationId", 901, 70, "Ada Sánchez"),
            *_people("annotationId", 902, 80, "Dana Ångström", "Bo Li"),
        ],
        "annotationShapes": [
            {"id": 911, "annotationId": 901, "shapeType": "Point"},
            {"id": 912, "annotationId": 902, "shapeType": "OrientedPoint"},
            {"id": 913, "annotationId": 903, "shapeType": "SegmentationMask"},
            {"id": 914, "annotationId": 904, "shapeType": "Point"},
            {"id": 915, "annotationId": 905, "shapeType": "InstanceSegmentation"},
        ],
        "annotationFiles": [
            _file(
                921,
                911,
                701,
                602,
                "10440/TS_1/Annotations/100/ribosome-1.0_point.ndjson",
                isVisualizationDefault=True,
            ),
            # The same run and spacing, but another alignment: another frame.
            _file(
                922,
                912,
                702,
                602,
                "10440/TS_1/Annotations/101/ribosome-1.0_orientedpoint.ndjson",
                source="community",
            ),
            _file(923, 913, 701, 602, "10440/TS_1/Annotations/102/membrane-1.0_segmentationmask.zarr"),
            _file(924, 913, 701, 602, "10440/TS_1/Annotations/102/membrane-1.0_segmentationmask.mrc"),
            _file(
                925,
                914,
                705,
                605,
                "10445/Position_7/Annotations/100/ribosome-1.0_point.ndjson",
                source="community",
            ),
            _file(926, 915, 701, 602, "10440/TS_1/Annotations/103/actin-1.0_instancesegmentation.ndjson"),
        ],
    }


def many(tomograms: int, *, runs: int | None = None, config: int = 2000) -> Rows:
    """Return deposition 10310 with one dataset, 10440, of that many tomograms, two to a run.

    Each tomogram has `config` bytes of neuroglancerConfig, which makes naive queries long.
    """
    count = runs or -(-tomograms // 2)
    rows: Rows = {
        "depositions": [{"id": OWN_TOMOGRAMS, "title": "Many tomograms"}],
        "datasets": [{"id": FIRST_DATASET, "depositionId": OWN_TOMOGRAMS, "title": "Many tomograms"}],
        "runs": [{"id": 1 + i, "name": f"TS_{1 + i}", "datasetId": FIRST_DATASET} for i in range(count)],
        "tomogramVoxelSpacings": [
            {"id": 1 + i, "runId": 1 + i, "voxelSpacing": COARSE} for i in range(count)
        ],
        "alignments": [{"id": 1 + i, "runId": 1 + i, "depositionId": OWN_TOMOGRAMS} for i in range(count)],
        "tomograms": [],
    }
    for number in range(tomograms):
        place = number % count
        rows["tomograms"].append(
            tomogram(
                100_000 + number,
                rows["runs"][place],
                rows["tomogramVoxelSpacings"][place],
                1 + place,
                processing="raw" if number < count else "denoised",
                neuroglancerConfig="x" * config,
            )
        )
    return rows
