"""Faster R-CNN with SLaK-T, trained on VOC 2007 and 2012 trainval, tested on 2007 test.

The recipe of faster_rcnn_slak_t_voc07.py; 07+12 is the field's other training set, and the paper
does not say which one it used.
"""

_base_ = ['faster_rcnn_slak_t_voc07.py']
voc07 = _base_.train_dataloader.dataset
voc12 = dict(
    voc07,
    ann_file='VOC2012/ImageSets/Main/trainval.txt',
    data_prefix=dict(sub_data_root='VOC2012/'),
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        ignore_keys=['dataset_type'],  # they differ in the year only
        datasets=[voc07, voc12],
    )
)
