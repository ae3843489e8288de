// SPDX-License-Identifier: Apache-2.0
// Stand-in for DeepStream's header of this name: what a bounding-box parser is given, and the check of its signature.
#pragma once

#include <string>
#include <vector>

#include "nvdsinfer.h"

typedef struct {
    unsigned int numClassesConfigured;
    std::vector<float> perClassPreclusterThreshold;
    std::vector<float> perClassPostclusterThreshold;
    std::vector<float> &perClassThreshold = perClassPreclusterThreshold;
} NvDsInferParseDetectionParams;

typedef bool (*NvDsInferParseCustomFunc)(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                                         NvDsInferParseDetectionParams const &,
                                         std::vector<NvDsInferObjectDetectionInfo> &);

#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(name) \
    static_assert(sizeof(static_cast<NvDsInferParseCustomFunc>(name)) != 0, "signature of a parser");
