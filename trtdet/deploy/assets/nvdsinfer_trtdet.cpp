// SPDX-License-Identifier: Apache-2.0
// Bounding-box parser for nvinfer and nvinferserver: the four outputs of create_onnx.py, found by name.
//
//   num_detections     int32   [1]
//   detection_boxes    float32 [K, 4], or [K, 5] with an angle in radians; network pixels, or 0 to 1
//   detection_scores   float32 [K]
//   detection_classes  int32   [K]
//
// The name of the function says what the boxes are: NvDsInferParseCustomTrtdet takes y1 x1 y2 x2 in network pixels.
// A fault of the configuration is printed and returned as false; it does not end the process.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <vector>

#include "nvdsinfer_custom_impl.h"

namespace {

using Layers = std::vector<NvDsInferLayerInfo>;

const NvDsInferLayerInfo *findLayer(const Layers &layers, const char *name, NvDsInferDataType type) {
    for (const NvDsInferLayerInfo &layer : layers) {
        if (layer.layerName == nullptr || std::strcmp(layer.layerName, name) != 0)
            continue;
        if (layer.dataType != type || layer.buffer == nullptr) {
            std::cerr << "trtdet parser: " << name << ": expected " << (type == INT32 ? "int32" : "float32")
                      << ", found data type " << layer.dataType << std::endl;
            return nullptr;
        }
        return &layer;
    }
    std::cerr << "trtdet parser: expected an output '" << name << "', found none; see output-blob-names" << std::endl;
    return nullptr;
}

unsigned int elements(const NvDsInferLayerInfo &layer) {
    unsigned int count = 1;
    for (unsigned int i = 0; i < layer.inferDims.numDims; ++i)
        count *= layer.inferDims.d[i];
    return count;
}

// Object infos have an angle from DeepStream 9 on.
template <typename Object>
auto setAngle(Object &object, float angle, int) -> decltype(object.rotation_angle, void()) {
    object.rotation_angle = angle;
}

template <typename Object>
void setAngle(Object &, float, long) {}

bool parse(const Layers &layers, const NvDsInferNetworkInfo &network, const NvDsInferParseDetectionParams &params,
           std::vector<NvDsInferObjectDetectionInfo> &objects, bool yFirst, bool normalized) {
    const NvDsInferLayerInfo *count = findLayer(layers, "num_detections", INT32);
    const NvDsInferLayerInfo *boxes = findLayer(layers, "detection_boxes", FLOAT);
    const NvDsInferLayerInfo *scores = findLayer(layers, "detection_scores", FLOAT);
    const NvDsInferLayerInfo *classes = findLayer(layers, "detection_classes", INT32);
    if (count == nullptr || boxes == nullptr || scores == nullptr || classes == nullptr)
        return false;

    const unsigned int slots = elements(*scores);
    const unsigned int values = slots == 0 ? 4 : elements(*boxes) / slots;
    if (values < 4 || values > 5 || elements(*classes) != slots) {
        std::cerr << "trtdet parser: expected " << slots << " boxes of 4 or 5 values and as many classes" << std::endl;
        return false;
    }
    const float width = static_cast<float>(network.width), height = static_cast<float>(network.height);
    const float scaleX = normalized ? width : 1.0f, scaleY = normalized ? height : 1.0f;
    const std::vector<float> &thresholds = params.perClassPreclusterThreshold;
    const int32_t found = *static_cast<const int32_t *>(count->buffer);
    const unsigned int kept = std::min(slots, static_cast<unsigned int>(std::max(found, 0)));

    for (unsigned int i = 0; i < kept; ++i) {
        const int32_t classId = static_cast<const int32_t *>(classes->buffer)[i];
        const float score = static_cast<const float *>(scores->buffer)[i];
        // Sorted by score, not by class: one that is not configured says nothing of those after it.
        if (classId < 0 || static_cast<unsigned int>(classId) >= params.numClassesConfigured)
            continue;
        const float threshold = static_cast<std::size_t>(classId) < thresholds.size() ? thresholds[classId] : 0.0f;
        if (!(score > 0.0f) || score < threshold)
            continue;
        const float *box = static_cast<const float *>(boxes->buffer) + static_cast<std::size_t>(values) * i;
        float x1 = box[yFirst ? 1 : 0] * scaleX, y1 = box[yFirst ? 0 : 1] * scaleY;
        float x2 = box[yFirst ? 3 : 2] * scaleX, y2 = box[yFirst ? 2 : 3] * scaleY;
        if (values == 4) {
            // nvinfer moves a corner left of the picture to 0 and keeps the width: clipped here, the far corner stays.
            x1 = std::min(std::max(x1, 0.0f), width), x2 = std::min(std::max(x2, 0.0f), width);
            y1 = std::min(std::max(y1, 0.0f), height), y2 = std::min(std::max(y2, 0.0f), height);
        }
        if (!(x2 > x1 && y2 > y1))
            continue;  // empty, or not a number: trackers and the OSD take neither
        NvDsInferObjectDetectionInfo object{};
        object.classId = static_cast<unsigned int>(classId);
        object.left = x1;
        object.top = y1;
        object.width = x2 - x1;
        object.height = y2 - y1;
        object.detectionConfidence = score;
        setAngle(object, values == 5 ? box[4] : 0.0f, 0);
        objects.push_back(object);
    }
    return true;
}

}  // namespace

#define TRTDET_PARSER(name, yFirst, normalized)                                                                      \
    extern "C" bool name(const std::vector<NvDsInferLayerInfo> &layers, const NvDsInferNetworkInfo &network,         \
                         const NvDsInferParseDetectionParams &params,                                                \
                         std::vector<NvDsInferObjectDetectionInfo> &objects) {                                       \
        return parse(layers, network, params, objects, yFirst, normalized);                                          \
    }                                                                                                                \
    CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(name)

TRTDET_PARSER(NvDsInferParseCustomTrtdet, true, false)
TRTDET_PARSER(NvDsInferParseCustomTrtdetNormalized, true, true)
TRTDET_PARSER(NvDsInferParseCustomTrtdetXyxy, false, false)
TRTDET_PARSER(NvDsInferParseCustomTrtdetXyxyNormalized, false, true)
