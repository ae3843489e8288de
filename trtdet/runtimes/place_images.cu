// SPDX-License-Identifier: Apache-2.0
// Decoded images -> rows of batches: what trtdet/images/preprocess.py does, on a GPU.
//
// One thread per pixel of a network input. The arithmetic is that of the libraries that do it on the
// CPU: OpenCV's bilinear resize in fixed point for uint8 (modules/imgproc/src/resize.cpp), the same
// in float32, TensorFlow 1's with corners aligned, and Pillow's triangle filter, whose two passes
// round in between (src/libImaging/Resample.c).

enum { FLOAT32 = 1, PLANES = 2, CORNER = 4, ANTIALIAS = 8 };
enum { BITS = 22, HALF = 1 << (BITS - 1) };  // of the triangle filter's weights
enum { KEPT_WEIGHTS = 64 };                  // of one axis; further ones are worked out again

struct Image {
    unsigned long long source;  // address of (height, width, 3) uint8
    unsigned long long target;  // address of one network input
    int height, width, pitch;   // of the source; bytes from row to row
    int top, left, rows, columns;  // of the picture in the network input
    int height_first;  // of the triangle filter's passes, which round in between
};

struct Taps {  // one axis: two neighbours and the weight of the second
    int first, second;
    float weight;
};

__device__ static int clamp_index(int index, int count)
{
    return index < 0 ? 0 : index >= count ? count - 1 : index;
}

__device__ static Taps half_pixel(double position, int source)
{
    const int lower = (int)floor(position);
    Taps taps = {clamp_index(lower, source), clamp_index(lower + 1, source), (float)(position - lower)};
    return taps;
}

__device__ static double center_of(int index, int source, int target)
{
    return (index + 0.5) * ((double)source / target) - 0.5;
}

__device__ static Taps corner(int index, int source, int target)
{
    const float position = index * ((float)source / target);
    const int lower = (int)position;
    Taps taps = {clamp_index(lower, source), clamp_index(lower + 1, source), position - lower};
    return taps;
}

__device__ static int to_level(int sum)
{
    const int level = sum >> BITS;
    return level < 0 ? 0 : level > 255 ? 255 : level;
}

struct Window {  // one axis of the triangle filter
    int begin, end;
    double center, scale, sum;
};

__device__ static double triangle(const Window& window, int index)
{
    const double distance = fabs((index - window.center + 0.5) * window.scale);
    return distance < 1.0 ? 1.0 - distance : 0.0;
}

__device__ static int weight_of(const Window& window, int index)
{
    return (int)(0.5 + triangle(window, index) / window.sum * (1 << BITS));
}

__device__ static Window window_of(int index, int source, int target)
{
    const double step = (double)source / target, support = step > 1.0 ? step : 1.0;
    Window window;
    window.center = (index + 0.5) * step;
    window.scale = 1.0 / support;
    window.begin = (int)(window.center - support + 0.5);
    window.end = (int)(window.center + support + 0.5);
    if (window.begin < 0) window.begin = 0;
    if (window.end > source) window.end = source;
    window.sum = 0.0;
    for (int i = window.begin; i < window.end; ++i) window.sum += triangle(window, i);
    return window;
}

__device__ static void antialiased(const Image& image, int row, int column, float* rgb)
{
    const unsigned char* source = (const unsigned char*)image.source;
    const Window y = window_of(row, image.height, image.rows);
    const Window x = window_of(column, image.width, image.columns);
    const Window inner = image.height_first ? y : x, outer = image.height_first ? x : y;
    const size_t step = image.height_first ? image.pitch : 3, stride = image.height_first ? 3 : image.pitch;
    int weights[KEPT_WEIGHTS];
    const int kept = inner.end - inner.begin < KEPT_WEIGHTS ? inner.end - inner.begin : KEPT_WEIGHTS;
    for (int j = 0; j < kept; ++j) weights[j] = weight_of(inner, inner.begin + j);
    int total[3] = {HALF, HALF, HALF};
    for (int i = outer.begin; i < outer.end; ++i) {
        const unsigned char* pixels = source + i * stride;
        int first[3] = {HALF, HALF, HALF};
        for (int j = inner.begin; j < inner.end; ++j) {
            const int weight = j - inner.begin < kept ? weights[j - inner.begin] : weight_of(inner, j);
            for (int c = 0; c < 3; ++c) first[c] += weight * pixels[j * step + c];
        }
        const int weight = weight_of(outer, i);
        for (int c = 0; c < 3; ++c) total[c] += weight * to_level(first[c]);
    }
    for (int c = 0; c < 3; ++c) rgb[c] = to_level(total[c]);
}

__device__ static void fixed_point(const Image& image, int row, int column, float* rgb)
{
    const unsigned char* source = (const unsigned char*)image.source;
    const Taps y = half_pixel((float)center_of(row, image.height, image.rows), image.height);
    Taps x = half_pixel((float)center_of(column, image.width, image.columns), image.width);
    if (x.first == x.second) x.weight = 0.0f;  // at the left and the right edge
    const int y1 = (int)rintf(y.weight * 2048.0f), y0 = (int)rintf((1.0f - y.weight) * 2048.0f);
    const int x1 = (int)rintf(x.weight * 2048.0f), x0 = (int)rintf((1.0f - x.weight) * 2048.0f);
    const unsigned char* upper = source + (size_t)y.first * image.pitch;
    const unsigned char* lower = source + (size_t)y.second * image.pitch;
    for (int c = 0; c < 3; ++c) {
        const int above = upper[3 * x.first + c] * x0 + upper[3 * x.second + c] * x1;
        const int below = lower[3 * x.first + c] * x0 + lower[3 * x.second + c] * x1;
        rgb[c] = (((y0 * (above >> 4)) >> 16) + ((y1 * (below >> 4)) >> 16) + 2) >> 2;
    }
}

__device__ static void bilinear(const Image& image, int row, int column, int how, float* rgb)
{
    const unsigned char* source = (const unsigned char*)image.source;
    const Taps y = how & CORNER ? corner(row, image.height, image.rows)
                                : half_pixel(center_of(row, image.height, image.rows), image.height);
    const Taps x = how & CORNER ? corner(column, image.width, image.columns)
                                : half_pixel(center_of(column, image.width, image.columns), image.width);
    const unsigned char* upper = source + (size_t)y.first * image.pitch;
    const unsigned char* lower = source + (size_t)y.second * image.pitch;
    for (int c = 0; c < 3; ++c) {
        const float a = upper[3 * x.first + c], b = upper[3 * x.second + c];
        const float d = lower[3 * x.first + c], e = lower[3 * x.second + c];
        if (how & CORNER) {  // rows first, which decides ties of uint8
            const float left = a + (d - a) * y.weight, right = b + (e - b) * y.weight;
            rgb[c] = left + (right - left) * x.weight;
        } else {
            const float above = a + (b - a) * x.weight, below = d + (e - d) * x.weight;
            rgb[c] = above + (below - above) * y.weight;
        }
    }
}

extern "C" __global__ void place_images(
    const Image* images, int height, int width, int how, float red, float green, float blue)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= height || column >= width) return;
    const Image image = images[blockIdx.z];
    const int y = row - image.top, x = column - image.left;
    float rgb[3] = {red, green, blue};
    if (y >= 0 && y < image.rows && x >= 0 && x < image.columns) {
        if (how & ANTIALIAS) antialiased(image, y, x, rgb);
        else if (how & (FLOAT32 | CORNER)) bilinear(image, y, x, how, rgb);
        else fixed_point(image, y, x, rgb);
    }
    for (int c = 0; c < 3; ++c) {
        const size_t at = how & PLANES ? ((size_t)c * height + row) * width + column
                                       : ((size_t)row * width + column) * 3 + c;
        if (how & FLOAT32) ((float*)image.target)[at] = rgb[c];
        else ((unsigned char*)image.target)[at] = (unsigned char)rintf(rgb[c]);
    }
}
