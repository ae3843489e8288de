// SPDX-License-Identifier: Apache-2.0
// Calls the DeepStream parser from Python: plain arrays in, plain arrays out.

#include <cstdint>
#include <vector>

#include "nvdsinfer_custom_impl.h"

#define DECLARE(name)                                                                                            \
    extern "C" bool name(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,                  \
                         NvDsInferParseDetectionParams const &, std::vector<NvDsInferObjectDetectionInfo> &);
DECLARE(NvDsInferParseCustomTrtdet)
DECLARE(NvDsInferParseCustomTrtdetNormalized)
DECLARE(NvDsInferParseCustomTrtdetXyxy)
DECLARE(NvDsInferParseCustomTrtdetXyxyNormalized)

struct Tensor {
    const char *name;
    int32_t type;
    int32_t dims[2];
    int32_t rank;
    void *data;
};

// Returns the number of objects, -1 where the parser fails; each object is 7 floats.
extern "C" int parse(int function, const Tensor *tensors, int count, unsigned width, unsigned height, unsigned classes,
                     const float *thresholds, float *objects) {
    const NvDsInferParseCustomFunc parsers[] = {NvDsInferParseCustomTrtdet, NvDsInferParseCustomTrtdetNormalized,
                                                NvDsInferParseCustomTrtdetXyxy,
                                                NvDsInferParseCustomTrtdetXyxyNormalized};
    std::vector<NvDsInferLayerInfo> layers;
    for (int i = 0; i < count; ++i) {
        NvDsInferLayerInfo layer{};
        layer.dataType = static_cast<NvDsInferDataType>(tensors[i].type);
        layer.layerName = tensors[i].name;
        layer.buffer = tensors[i].data;
        layer.inferDims.numDims = tensors[i].rank;
        layer.inferDims.numElements = 1;
        for (int d = 0; d < tensors[i].rank; ++d) {
            layer.inferDims.d[d] = tensors[i].dims[d];
            layer.inferDims.numElements *= tensors[i].dims[d];
        }
        layers.push_back(layer);
    }
    NvDsInferParseDetectionParams params{};
    params.numClassesConfigured = classes;
    params.perClassPreclusterThreshold.assign(thresholds, thresholds + classes);
    std::vector<NvDsInferObjectDetectionInfo> found;
    if (!parsers[function](layers, NvDsInferNetworkInfo{width, height, 3}, params, found))
        return -1;
    for (const NvDsInferObjectDetectionInfo &object : found) {
        const float values[] = {object.left,
                                object.top,
                                object.width,
                                object.height,
                                object.detectionConfidence,
                                static_cast<float>(object.classId),
#ifdef STANDIN_BEFORE_DEEPSTREAM_9
                                0.0f};
#else
                                object.rotation_angle};
#endif
        for (float value : values)
            *objects++ = value;
    }
    return static_cast<int>(found.size());
}
