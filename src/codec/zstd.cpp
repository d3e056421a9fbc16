#include <zstd.h>

#include <memory>

#include "base/try.h"
#include "codec/codec.h"

namespace qcow::codec {
namespace {

constexpr int max_window_log = 22;  // twice the largest cluster; clusters need no window beyond themselves

struct FreeContext {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

std::unexpected<Error> damaged_zstd(std::string what) { return fail(Errc::corrupt, "zstd stream", std::move(what)); }

/// Decodes as far as the output reaches, through a window of bounded size.
Result<void> decompress_prefix(ZSTD_DCtx* context, std::span<const std::byte> in, std::span<std::byte> out) {
    ZSTD_DCtx_reset(context, ZSTD_reset_session_only);
    ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, max_window_log);
    ZSTD_inBuffer input{in.data(), in.size(), 0};
    ZSTD_outBuffer output{out.data(), out.size(), 0};
    while (output.pos < output.size) {
        const auto before = input.pos + output.pos;
        const std::size_t status = ZSTD_decompressStream(context, &output, &input);
        if (ZSTD_isError(status) != 0) return damaged_zstd(ZSTD_getErrorName(status));
        if (input.pos + output.pos == before) return damaged_zstd("it ends before the cluster is full");
    }
    return {};
}

}  // namespace

Result<void> decompress_zstd(std::span<const std::byte> in, std::span<std::byte> out) {
    thread_local const std::unique_ptr<ZSTD_DCtx, FreeContext> context(ZSTD_createDCtx());
    if (!context) return fail(Errc::no_memory, "zstd stream", "no memory for a decompressor");
    // One frame that is exactly the cluster is what encoders write, and decodes without a window of its own.
    const std::size_t frame = ZSTD_findFrameCompressedSize(in.data(), in.size());
    if (ZSTD_isError(frame) == 0) {
        const std::size_t decoded = ZSTD_decompressDCtx(context.get(), out.data(), out.size(), in.data(), frame);
        if (decoded == out.size()) return {};
    }
    return decompress_prefix(context.get(), in, out);
}

}  // namespace qcow::codec
