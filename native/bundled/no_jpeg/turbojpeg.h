// What FFCV 1.0.2 needs of libjpeg-turbo to compile, for machines without it. Raw images do not use it.
//
// FFCV does not look at what a JPEG decoder returns: one that only failed would hand out uninitialised memory
// as images. So the first use ends the process and says why. simclr refuses JPEG files before that.

#ifndef SIMCLR_NATIVE_TURBOJPEG_H
#define SIMCLR_NATIVE_TURBOJPEG_H

#include <cstdio>
#include <cstdlib>

typedef void *tjhandle;

typedef struct {
    int x, y, w, h;
} tjregion;

typedef struct {
    int num, denom;
} tjscalingfactor;

typedef struct {
    tjregion r;
    int op, options;
} tjtransform;

enum { TJPF_RGB = 0, TJXOP_HFLIP = 1, TJXOPT_CROP = 4, TJFLAG_NOREALLOC = 1024, TJFLAG_FASTDCT = 2048 };

#define TJSCALED(length, factor) (((length) * (factor).num + (factor).denom - 1) / (factor).denom)

namespace {

[[noreturn]] inline void refuse_jpeg() {
    std::fputs(
        "\nffcv: this build has no libjpeg-turbo and cannot decode JPEG images. Install libturbojpeg0-dev\n"
        "(Ubuntu also: libturbojpeg-dev) and run `python native/install_ffcv.py` again, or convert the data\n"
        "set with raw images. The process ends here.\n",
        stderr);
    std::abort();
}

inline tjhandle tjInitTransform() { refuse_jpeg(); }
inline tjhandle tjInitDecompress() { refuse_jpeg(); }

inline int tjTransform(tjhandle, const unsigned char *, unsigned long, int, unsigned char **, unsigned long *,
                       tjtransform *, int) {
    refuse_jpeg();
}

inline int tjDecompress2(tjhandle, const unsigned char *, unsigned long, unsigned char *, int, int, int, int, int) {
    refuse_jpeg();
}

inline void tjFree(unsigned char *) { refuse_jpeg(); }

}  // namespace

#endif  // SIMCLR_NATIVE_TURBOJPEG_H
