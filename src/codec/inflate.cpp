#include <libdeflate.h>
#include <zlib.h>

#include <memory>

#include "base/try.h"
#include "codec/codec.h"

namespace qcow::codec {
namespace {

struct FreeDecompressor {
    void operator()(libdeflate_decompressor* d) const { libdeflate_free_decompressor(d); }
};

std::unexpected<Error> damaged_deflate(std::string what) {
    return fail(Errc::corrupt, "deflate stream", std::move(what));
}

/// zlib stops when the output is full; libdeflate takes whatever is wrong or missing behind that for an error.
Result<void> inflate_prefix(std::span<const std::byte> in, std::span<std::byte> out) {
    z_stream stream = {};
    if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) return fail(Errc::no_memory, "deflate stream", "no memory for zlib");
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));
    stream.avail_in = static_cast<uInt>(in.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    const int status = ::inflate(&stream, Z_FINISH);
    const bool full = stream.avail_out == 0;
    inflateEnd(&stream);
    if (full) return {};
    return damaged_deflate(status == Z_STREAM_END || status == Z_BUF_ERROR ? "it ends before the cluster is full"
                                                                           : "it cannot be decoded");
}

}  // namespace

Result<void> inflate(std::span<const std::byte> in, std::span<std::byte> out) {
    thread_local const std::unique_ptr<libdeflate_decompressor, FreeDecompressor> decompressor(
        libdeflate_alloc_decompressor());
    if (!decompressor) return fail(Errc::no_memory, "deflate stream", "no memory for libdeflate");
    std::size_t decoded = 0;
    const auto status =
        libdeflate_deflate_decompress(decompressor.get(), in.data(), in.size(), out.data(), out.size(), &decoded);
    return status == LIBDEFLATE_SUCCESS && decoded == out.size() ? Result<void>() : inflate_prefix(in, out);
}

}  // namespace qcow::codec
