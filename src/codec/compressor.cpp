#include "codec/compressor.h"

#include <fmt/format.h>
#include <isa-l/igzip_lib.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <new>
#include <vector>

#include "base/try.h"

namespace qcow::codec {
namespace {

constexpr int window_bits = 12;

class IsalCompressor final : public Compressor {
public:
    explicit IsalCompressor(int level) : level_(level), memory_(buffer_bytes(level)) {}

    std::size_t compress(std::span<const std::byte> in, std::span<std::byte> out) override {
        isal_deflate_init(&stream_);
        stream_.level = static_cast<std::uint32_t>(level_);
        stream_.level_buf = memory_.data();
        stream_.level_buf_size = static_cast<std::uint32_t>(memory_.size());
        stream_.hist_bits = window_bits;
        stream_.gzip_flag = IGZIP_DEFLATE;
        stream_.end_of_stream = 1;
        stream_.flush = NO_FLUSH;
        stream_.next_in = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(in.data()));
        stream_.avail_in = static_cast<std::uint32_t>(in.size());
        stream_.next_out = reinterpret_cast<std::uint8_t*>(out.data());
        stream_.avail_out = static_cast<std::uint32_t>(out.size());
        const bool done = isal_deflate(&stream_) == COMP_OK && stream_.internal_state.state == ZSTATE_END;
        return done ? stream_.total_out : 0;
    }

private:
    static std::size_t buffer_bytes(int level) {
        constexpr std::array sizes = {ISAL_DEF_LVL0_DEFAULT, ISAL_DEF_LVL1_DEFAULT, ISAL_DEF_LVL2_DEFAULT,
                                      ISAL_DEF_LVL3_DEFAULT};
        return sizes.at(static_cast<std::size_t>(level));
    }

    int level_;
    std::vector<std::uint8_t> memory_;
    isal_zstream stream_ = {};
};

class ZlibCompressor final : public Compressor {
public:
    explicit ZlibCompressor(int level) {
        constexpr int most_memory = 9;
        if (deflateInit2(&stream_, level, Z_DEFLATED, -window_bits, most_memory, Z_DEFAULT_STRATEGY) != Z_OK) {
            throw std::bad_alloc();
        }
    }
    ~ZlibCompressor() override { deflateEnd(&stream_); }

    std::size_t compress(std::span<const std::byte> in, std::span<std::byte> out) override {
        deflateReset(&stream_);
        stream_.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(in.data()));
        stream_.avail_in = static_cast<uInt>(in.size());
        stream_.next_out = reinterpret_cast<Bytef*>(out.data());
        stream_.avail_out = static_cast<uInt>(out.size());
        return deflate(&stream_, Z_FINISH) == Z_STREAM_END ? out.size() - stream_.avail_out : 0;
    }

private:
    z_stream stream_ = {};
};

class ZstdCompressor final : public Compressor {
public:
    explicit ZstdCompressor(int level) : context_(ZSTD_createCCtx()) {
        if (!context_) throw std::bad_alloc();
        ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, level);
    }

    std::size_t compress(std::span<const std::byte> in, std::span<std::byte> out) override {
        const std::size_t length = ZSTD_compress2(context_.get(), out.data(), out.size(), in.data(), in.size());
        return ZSTD_isError(length) != 0 ? 0 : length;
    }

private:
    struct Free {
        void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
    };
    std::unique_ptr<ZSTD_CCtx, Free> context_;
};

}  // namespace

Result<std::unique_ptr<Compressor>> make_compressor(Compression compression, std::optional<int> level) {
    constexpr int default_zlib = 2;
    constexpr int default_zstd = 3;
    constexpr int last_isal = 3;
    const bool zstd = compression == Compression::zstd;
    const int chosen = level.value_or(zstd ? default_zstd : default_zlib);
    const int highest = zstd ? 19 : 9;
    if (chosen < 1 || chosen > highest) {
        return fail(Errc::invalid_argument, "compression level",
                    fmt::format("{} is outside of 1 to {}", chosen, highest));
    }
    if (zstd) return std::make_unique<ZstdCompressor>(chosen);
    if (chosen <= last_isal) return std::make_unique<IsalCompressor>(chosen);
    return std::make_unique<ZlibCompressor>(chosen);
}

}  // namespace qcow::codec
