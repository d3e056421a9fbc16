#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "base/bits.h"
#include "base/endian.h"
#include "codec/codec.h"
#include "fuzz/inputs.h"
#include "fuzz/require.h"

namespace qcow::fuzz {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t max_output = 64 * KiB;

struct Oracle {
    bool full = false;      // it filled the output
    bool complete = false;  // and the stream ended exactly there
};

/// zlib as the format's reference reader uses it: all at once, until the stream ends or the output is full.
Oracle zlib_oracle(std::span<const std::byte> in, std::span<std::byte> out) {
    z_stream stream = {};
    QCOW_REQUIRE(inflateInit2(&stream, -MAX_WBITS) == Z_OK);
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));
    stream.avail_in = static_cast<uInt>(in.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    const int status = inflate(&stream, Z_FINISH);
    const bool full = stream.avail_out == 0;
    inflateEnd(&stream);
    return {full && (status == Z_STREAM_END || status == Z_BUF_ERROR), full && status == Z_STREAM_END};
}

/// libzstd as a stream, through whatever window the frames ask for up to twice the largest cluster.
Oracle zstd_oracle(std::span<const std::byte> in, std::span<std::byte> out) {
    const std::unique_ptr<ZSTD_DCtx, decltype([](ZSTD_DCtx* c) { ZSTD_freeDCtx(c); })> context(ZSTD_createDCtx());
    ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, 22);
    ZSTD_inBuffer input{in.data(), in.size(), 0};
    ZSTD_outBuffer output{out.data(), out.size(), 0};
    std::size_t status = 1;
    while (output.pos < output.size) {
        const auto before = input.pos + output.pos;
        status = ZSTD_decompressStream(context.get(), &output, &input);
        if (ZSTD_isError(status) != 0 || input.pos + output.pos == before) return {};
    }
    return {true, status == 0};
}

using Decode = Result<void> (*)(std::span<const std::byte>, std::span<std::byte>);

/// The decoder may take more than the oracle does, since libdeflate and one-shot zstd look at other things, but not
/// less, and what both take they decode alike.
void compare(Decode decode, Oracle (*oracle)(std::span<const std::byte>, std::span<std::byte>),
             std::span<const std::byte> in, std::size_t size) {
    Bytes ours(size, std::byte{0xa5});
    Bytes theirs(size);
    const bool decoded = succeeded(decode(in, ours));
    const auto verdict = oracle(in, theirs);
    QCOW_REQUIRE(decoded || !verdict.full);
    QCOW_REQUIRE(!decoded || !verdict.full || ours == theirs);
}

/// What encoders write comes back, whatever follows it, and also where the stream would go on.
void round_trip(Decode decode, Bytes stream, std::span<const std::byte> plain, std::size_t garbage) {
    if (plain.empty()) return;
    for (std::size_t i = 0; i < garbage; ++i) stream.push_back(static_cast<std::byte>(i * 37));
    Bytes out(plain.size());
    QCOW_REQUIRE(succeeded(decode(stream, out)));
    QCOW_REQUIRE(std::ranges::equal(out, plain));
    out.resize((plain.size() + 1) / 2);
    QCOW_REQUIRE(succeeded(decode(stream, out)));
    QCOW_REQUIRE(std::ranges::equal(out, plain.first(out.size())));
}

Bytes deflate_all(std::span<const std::byte> plain, int level) {
    z_stream stream = {};
    QCOW_REQUIRE(deflateInit2(&stream, level, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) == Z_OK);
    Bytes out(deflateBound(&stream, plain.size()));
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(plain.data()));
    stream.avail_in = static_cast<uInt>(plain.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    QCOW_REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

Bytes zstd_all(std::span<const std::byte> plain, int level) {
    Bytes out(ZSTD_compressBound(plain.size()));
    const auto size = ZSTD_compress(out.data(), out.size(), plain.data(), plain.size(), level);
    QCOW_REQUIRE(ZSTD_isError(size) == 0);
    out.resize(size);
    return out;
}

}  // namespace

void run_codec_input(std::span<const std::byte> input) {
    if (input.size() < 3) return;
    const auto selector = static_cast<unsigned>(input[0]);
    const std::size_t size = load_be<std::uint16_t>(input, 1) % max_output + 1;
    const auto in = input.subspan(3);
    const int level = static_cast<int>(selector >> 4) % 9 + 1;
    switch (selector & 3) {
        case 0: compare(codec::inflate, zlib_oracle, in, size); break;
        case 1: compare(codec::decompress_zstd, zstd_oracle, in, size); break;
        case 2: round_trip(codec::inflate, deflate_all(in, level), in, size % 600); break;
        default: round_trip(codec::decompress_zstd, zstd_all(in, level), in, size % 600); break;
    }
}

}  // namespace qcow::fuzz
