// What FFCV 1.0.2 needs of OpenCV, for machines without OpenCV's headers.
//
// FFCV's native code uses OpenCV in one place: it wraps the source and the target image in a cv::Mat each, cuts
// a rectangle out of the source, and calls cv::resize with INTER_AREA. All images are 8-bit RGB. This header
// offers those names and nothing more. Its results are compared with the real OpenCV's whenever FFCV is
// installed (verify_ffcv.py) and in the tests.
//
// Everything lies in an unnamed namespace: no symbol leaves FFCV's library, so that none can be confused with
// those of a real OpenCV in the same process.

#ifndef SIMCLR_NATIVE_OPENCV_HPP
#define SIMCLR_NATIVE_OPENCV_HPP

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// OpenCV's code for "three channels of 8 bits".
#define CV_8UC3 16

namespace cv {
namespace {

enum InterpolationFlags { INTER_AREA = 3 };

struct Size {
    int width;
    int height;
};

// A rectangle of 8-bit RGB pixels in memory that belongs to the caller.
class Mat {
  public:
    static constexpr int channels = 3;

    Mat(int rows, int cols, int /* type, always CV_8UC3 */, void *data)
        : Mat(rows, cols, static_cast<uint8_t *>(data), static_cast<size_t>(cols) * channels) {}

    // The half-open range [start, end) of columns or rows, without a copy.
    Mat colRange(int start, int end) const {
        return Mat(rows, end - start, data + static_cast<size_t>(start) * channels, row_stride);
    }
    Mat rowRange(int start, int end) const { return Mat(end - start, cols, row(start), row_stride); }

    Size size() const { return Size{cols, rows}; }
    uint8_t *row(int y) const { return data + static_cast<size_t>(y) * row_stride; }

    const int rows;
    const int cols;

  private:
    Mat(int rows, int cols, uint8_t *data, size_t row_stride)
        : rows(rows), cols(cols), data(data), row_stride(row_stride) {}

    uint8_t *const data;
    const size_t row_stride;  // bytes from one row to the next
};

// Nearest integer, halves to even, held in 0..255.
inline uint8_t to_byte(float value) {
    return static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, std::nearbyint(value))));
}

// How OpenCV computes a ratio; the order of the divisions decides the last bit.
inline double source_per_target(int source, int target) {
    return 1.0 / (static_cast<double>(target) / source);
}

// ---- Shrinking by whole numbers: every target pixel is the mean of a block of source pixels.

inline void average_blocks(const Mat &source, const Mat &target, int block_width, int block_height) {
    const int area = block_width * block_height;
    const float weight = 1.0f / area;
    for (int y = 0; y < target.rows; ++y) {
        uint8_t *out = target.row(y);
        for (int x = 0; x < target.cols; ++x) {
            for (int c = 0; c < Mat::channels; ++c) {
                int sum = 0;
                for (int v = 0; v < block_height; ++v) {
                    const uint8_t *in = source.row(y * block_height + v) + x * block_width * Mat::channels + c;
                    for (int u = 0; u < block_width; ++u) sum += in[u * Mat::channels];
                }
                // OpenCV rounds halves up for 2x2 blocks and to even for all others.
                const bool two_by_two = block_width == 2 && block_height == 2;
                *out++ = two_by_two ? static_cast<uint8_t>((sum + 2) >> 2) : to_byte(sum * weight);
            }
        }
    }
}

// ---- Shrinking by any ratio: every target pixel is the mean over the area it covers in the source.

// The consecutive source pixels under one target pixel along one axis, each with the share it contributes.
struct Cover {
    int first;
    std::vector<float> shares;
};

inline std::vector<Cover> covers_along_axis(int source, int target) {
    // A sliver thinner than this at either end of a target pixel counts for nothing.
    const double sliver = 1e-3;
    const double scale = source_per_target(source, target);
    std::vector<Cover> covers;
    covers.reserve(target);
    for (int t = 0; t < target; ++t) {
        const double begin = t * scale;
        const double end = begin + scale;
        const double width = std::min(scale, source - begin);
        const int last_whole = std::min(static_cast<int>(std::floor(end)), source - 1);
        const int first_whole = std::min(static_cast<int>(std::ceil(begin)), last_whole);

        Cover cover{first_whole, {}};
        if (first_whole - begin > sliver) {
            cover.first = first_whole - 1;
            cover.shares.push_back(static_cast<float>((first_whole - begin) / width));
        }
        cover.shares.insert(cover.shares.end(), last_whole - first_whole, static_cast<float>(1.0 / width));
        if (end - last_whole > sliver) {
            cover.shares.push_back(static_cast<float>(std::min({end - last_whole, 1.0, width}) / width));
        }
        covers.push_back(cover);
    }
    return covers;
}

inline void average_areas(const Mat &source, const Mat &target) {
    const std::vector<Cover> columns = covers_along_axis(source.cols, target.cols);
    const std::vector<Cover> rows = covers_along_axis(source.rows, target.rows);
    std::vector<float> sums(static_cast<size_t>(target.cols) * Mat::channels);
    for (int y = 0; y < target.rows; ++y) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (size_t v = 0; v < rows[y].shares.size(); ++v) {
            const uint8_t *in = source.row(rows[y].first + static_cast<int>(v));
            const float row_share = rows[y].shares[v];
            for (int x = 0; x < target.cols; ++x) {
                const uint8_t *pixel = in + static_cast<size_t>(columns[x].first) * Mat::channels;
                for (int c = 0; c < Mat::channels; ++c) {
                    float across = 0.0f;
                    for (size_t u = 0; u < columns[x].shares.size(); ++u) {
                        across += pixel[u * Mat::channels + c] * columns[x].shares[u];
                    }
                    sums[static_cast<size_t>(x) * Mat::channels + c] += row_share * across;
                }
            }
        }
        std::transform(sums.begin(), sums.end(), target.row(y), to_byte);
    }
}

// ---- Enlarging along at least one axis: OpenCV then mixes two neighbours along each axis, placed so that
// ---- whole-number ratios repeat pixels exactly. Its arithmetic is fixed point with 11 bits.

struct Neighbours {
    int first;
    int second;
    int first_weight;  // the two weights sum to about 2^11
    int second_weight;
};

inline std::vector<Neighbours> neighbours_along_axis(int source, int target) {
    const float one = 2048.0f;
    const double target_per_source = static_cast<double>(target) / source;
    const double scale = source_per_target(source, target);
    std::vector<Neighbours> all;
    all.reserve(target);
    for (int t = 0; t < target; ++t) {
        int first = static_cast<int>(std::floor(t * scale));
        float fraction = static_cast<float>((t + 1) - (first + 1) * target_per_source);
        fraction = fraction <= 0.0f ? 0.0f : fraction - std::floor(fraction);
        if (first >= source - 1) {
            first = source - 1;
            fraction = 0.0f;
        }
        all.push_back({first, std::min(first + 1, source - 1),
                       static_cast<int>(std::nearbyint((1.0f - fraction) * one)),
                       static_cast<int>(std::nearbyint(fraction * one))});
    }
    return all;
}

inline void mix_neighbours(const Mat &source, const Mat &target) {
    const std::vector<Neighbours> columns = neighbours_along_axis(source.cols, target.cols);
    const std::vector<Neighbours> rows = neighbours_along_axis(source.rows, target.rows);
    for (int y = 0; y < target.rows; ++y) {
        const uint8_t *above = source.row(rows[y].first);
        const uint8_t *below = source.row(rows[y].second);
        uint8_t *out = target.row(y);
        for (int x = 0; x < target.cols; ++x) {
            const int left = columns[x].first * Mat::channels;
            const int right = columns[x].second * Mat::channels;
            for (int c = 0; c < Mat::channels; ++c) {
                const int upper = above[left + c] * columns[x].first_weight + above[right + c] * columns[x].second_weight;
                const int lower = below[left + c] * columns[x].first_weight + below[right + c] * columns[x].second_weight;
                // The shifts drop 4 + 16 + 2 = 22 bits, those of both weights, and are placed as OpenCV's.
                const int mixed = ((rows[y].first_weight * (upper >> 4)) >> 16) +
                                  ((rows[y].second_weight * (lower >> 4)) >> 16);
                *out++ = static_cast<uint8_t>(std::min(255, (mixed + 2) >> 2));
            }
        }
    }
}

// cv::resize for 8-bit RGB and INTER_AREA. The target has its size already: the size and the two scale factors
// that OpenCV's signature has are not used.
inline void resize(const Mat &source, const Mat &target, Size, double, double, int /* always INTER_AREA */) {
    if (source.rows == target.rows && source.cols == target.cols) {
        for (int y = 0; y < target.rows; ++y) {
            std::memcpy(target.row(y), source.row(y), static_cast<size_t>(target.cols) * Mat::channels);
        }
        return;
    }
    const double across = source_per_target(source.cols, target.cols);
    const double down = source_per_target(source.rows, target.rows);
    if (across < 1.0 || down < 1.0) {
        mix_neighbours(source, target);
        return;
    }
    const int block_width = static_cast<int>(std::nearbyint(across));
    const int block_height = static_cast<int>(std::nearbyint(down));
    if (std::abs(across - block_width) < DBL_EPSILON && std::abs(down - block_height) < DBL_EPSILON) {
        average_blocks(source, target, block_width, block_height);
    } else {
        average_areas(source, target);
    }
}

}  // namespace
}  // namespace cv

#endif  // SIMCLR_NATIVE_OPENCV_HPP
