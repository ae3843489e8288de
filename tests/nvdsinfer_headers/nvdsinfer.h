// SPDX-License-Identifier: Apache-2.0
// Stand-in for DeepStream's header of this name: the types that a parser touches, with the fields, order and types of DeepStream 9.1.
#pragma once

#define NVDSINFER_MAX_DIMS 8

typedef struct {
    unsigned int numDims;
    unsigned int d[NVDSINFER_MAX_DIMS];
    unsigned int numElements;
} NvDsInferDims;

typedef enum { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3, INT64 = 4, UINT8 = 5 } NvDsInferDataType;

typedef struct {
    NvDsInferDataType dataType;
    union {
        NvDsInferDims inferDims;
        NvDsInferDims dims;
    };
    int bindingIndex;
    const char *layerName;
    void *buffer;
    int isInput;
} NvDsInferLayerInfo;

typedef struct {
    unsigned int width, height, channels;
} NvDsInferNetworkInfo;

typedef struct {
    unsigned int classId;
    float left, top, width, height, detectionConfidence;
#ifndef STANDIN_BEFORE_DEEPSTREAM_9
    float rotation_angle;
#endif
} NvDsInferObjectDetectionInfo;
