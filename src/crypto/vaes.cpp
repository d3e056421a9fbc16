#include <array>
#include <cstring>
#include <utility>

#include "crypto/xts.h"

#ifdef __x86_64__
#include <immintrin.h>

// What needs these instructions is called only where the processor has them.
#define QCOW_WIDE __attribute__((target("aes,avx512f,avx512bw,vaes,vpclmulqdq")))
#define QCOW_WIDE_INLINE __attribute__((target("aes,avx512f,avx512bw,vaes,vpclmulqdq"), always_inline)) inline

namespace qcow::crypto {
namespace {

constexpr std::size_t vector_bytes = 64;
constexpr std::size_t max_round_keys = 15;
constexpr std::size_t stride = 512;  // bytes that are on their way at once
constexpr std::size_t sectors_at_once = 16;

// The types of the compiler, as elements of arrays.
struct Block {
    __m128i bits;
};
struct FourBlocks {
    __m512i bits;
};

using RoundKeys = std::array<Block, max_round_keys>;

/// The keys of all rounds (FIPS 197, section 5.2). They lie in a Secret.
struct Schedule {
    RoundKeys encrypt;
    RoundKeys decrypt;
    RoundKeys tweak;
};

/// Applies the S-box to each byte of a word.
QCOW_WIDE std::uint32_t substituted(std::uint32_t word) {
    // All columns are equal, so that the rotation of rows changes nothing.
    const auto column = _mm_set1_epi32(static_cast<int>(word));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_aesenclast_si128(column, _mm_setzero_si128())));
}

/// Expands a key of 4, 6 or 8 words.
QCOW_WIDE void expand(std::span<const std::byte> key, RoundKeys& to) {
    const std::size_t key_words = key.size() / 4;
    const std::size_t all_words = (key_words + 7) * 4;
    std::uint32_t round_constant = 1;
    std::uint32_t word = 0;
    auto* const bytes = reinterpret_cast<std::byte*>(to.data());
    std::memcpy(bytes, key.data(), key.size());
    std::memcpy(&word, key.data() + key.size() - 4, 4);
    for (std::size_t i = key_words; i < all_words; ++i) {
        if (i % key_words == 0) {
            word = substituted(word >> 8 | word << 24) ^ round_constant;
            round_constant = (round_constant << 1) ^ ((round_constant >> 7) * 0x11b);
        } else if (key_words == 8 && i % key_words == 4) {
            word = substituted(word);
        }
        std::uint32_t before = 0;
        std::memcpy(&before, bytes + (i - key_words) * 4, 4);
        word ^= before;
        std::memcpy(bytes + i * 4, &word, 4);
    }
}

/// The keys of the equivalent inverse cipher (FIPS 197, section 5.3.5).
QCOW_WIDE void invert(const RoundKeys& keys, std::size_t rounds, RoundKeys& to) {
    to[0] = keys[rounds];
    for (std::size_t i = 1; i < rounds; ++i) to[i] = {_mm_aesimc_si128(keys[rounds - i].bits)};
    to[rounds] = keys[0];
}

/// One instruction for each element, without a loop: so compilers keep the elements in registers.
template <std::size_t... i>
QCOW_WIDE_INLINE void add(std::array<FourBlocks, sizeof...(i)>& to, __m512i key, std::index_sequence<i...>) {
    ((to[i].bits = _mm512_xor_si512(to[i].bits, key)), ...);
}
template <Direction direction, std::size_t... i>
QCOW_WIDE_INLINE void run_round(std::array<FourBlocks, sizeof...(i)>& blocks, __m512i key, std::index_sequence<i...>) {
    ((blocks[i].bits = direction == Direction::encrypt ? _mm512_aesenc_epi128(blocks[i].bits, key)
                                                       : _mm512_aesdec_epi128(blocks[i].bits, key)),
     ...);
}
template <Direction direction, std::size_t... i>
QCOW_WIDE_INLINE void run_last(std::array<FourBlocks, sizeof...(i)>& blocks, __m512i key, std::index_sequence<i...>) {
    ((blocks[i].bits = direction == Direction::encrypt ? _mm512_aesenclast_epi128(blocks[i].bits, key)
                                                       : _mm512_aesdeclast_epi128(blocks[i].bits, key)),
     ...);
}

template <Direction direction, std::size_t count>
QCOW_WIDE_INLINE void run_rounds(const Block* keys, std::size_t rounds, std::array<FourBlocks, count>& blocks) {
    constexpr std::make_index_sequence<count> all;
    add(blocks, _mm512_broadcast_i32x4(keys[0].bits), all);
    for (std::size_t round = 1; round < rounds; ++round)
        run_round<direction>(blocks, _mm512_broadcast_i32x4(keys[round].bits), all);
    run_last<direction>(blocks, _mm512_broadcast_i32x4(keys[rounds].bits), all);
}

/// Adds what was shifted out of the halves of the tweaks: of the low half to the high one, and of the high half to the
/// low one, by x^128 = x^7 + x^2 + x + 1.
QCOW_WIDE_INLINE __m512i reduced(__m512i shifted, __m512i carries) {
    const auto polynomial = _mm512_set1_epi64(0x87);
    const auto to_high = _mm512_bslli_epi128(carries, 8);
    const auto to_low = _mm512_clmulepi64_epi128(carries, polynomial, 0x01);
    return _mm512_ternarylogic_epi64(shifted, to_high, to_low, 0x96);
}

/// The tweaks of four blocks from that of the first.
QCOW_WIDE_INLINE __m512i first_four(__m128i tweak) {
    const auto all = _mm512_broadcast_i32x4(tweak);
    const auto shifts = _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0);
    const auto shifted_out = _mm512_sub_epi64(_mm512_set1_epi64(64), shifts);
    return reduced(_mm512_sllv_epi64(all, shifts), _mm512_srlv_epi64(all, shifted_out));
}

/// The tweaks of the four blocks that follow.
QCOW_WIDE_INLINE __m512i next_four(__m512i tweaks) {
    return reduced(_mm512_slli_epi64(tweaks, 4), _mm512_srli_epi64(tweaks, 60));
}

/// The tweaks of the first blocks of sectors.
QCOW_WIDE_INLINE void encrypt_numbers(const Block* keys, std::size_t rounds, SectorNumbers numbers,
                                      std::array<Block, sectors_at_once>& to) {
    for (std::size_t i = 0; i < to.size(); ++i) {
        const auto number = (numbers.first + i * numbers.step) & numbers.mask;
        to[i] = {_mm_set_epi64x(0, static_cast<std::int64_t>(number))};
    }
    std::array<FourBlocks, sizeof(to) / vector_bytes> blocks;
    std::memcpy(blocks.data(), to.data(), sizeof(to));
    run_rounds<Direction::encrypt>(keys, rounds, blocks);
    std::memcpy(to.data(), blocks.data(), sizeof(to));
}

/// Encrypts or decrypts one stride. Returns the tweak of the next.
template <Direction direction, std::size_t... i>
QCOW_WIDE_INLINE __m512i run_stride(const Block* keys, std::size_t rounds, __m512i tweak, const std::byte* from,
                                    std::byte* to, std::index_sequence<i...>) {
    std::array<FourBlocks, sizeof...(i)> tweaks;
    std::array<FourBlocks, sizeof...(i)> blocks;
    ((tweaks[i].bits = tweak, tweak = next_four(tweak)), ...);
    ((blocks[i].bits = _mm512_xor_si512(_mm512_loadu_si512(from + i * vector_bytes), tweaks[i].bits)), ...);
    run_rounds<direction>(keys, rounds, blocks);
    (_mm512_storeu_si512(to + i * vector_bytes, _mm512_xor_si512(blocks[i].bits, tweaks[i].bits)), ...);
    return tweak;
}

template <Direction direction>
QCOW_WIDE void run_sectors(const RoundKeys& data_keys, const RoundKeys& tweak_keys, std::size_t rounds,
                           SectorNumbers numbers, std::span<const std::byte> from, std::byte* to) {
    std::array<Block, sectors_at_once> starts;
    for (std::size_t sector = 0; !from.empty(); ++sector) {
        if (sector % sectors_at_once == 0) {
            encrypt_numbers(tweak_keys.data(), rounds, numbers, starts);
            numbers.first += sectors_at_once * numbers.step;
        }
        auto tweak = first_four(starts[sector % sectors_at_once].bits);
        for (std::size_t at = 0; at < numbers.sector_bytes; at += stride) {
            tweak = run_stride<direction>(data_keys.data(), rounds, tweak, from.data() + at, to + at,
                                          std::make_index_sequence<stride / vector_bytes>());
        }
        from = from.subspan(numbers.sector_bytes);
        to += numbers.sector_bytes;
    }
}

class Wide final : public WideXts {
public:
    explicit Wide(std::span<const std::byte> key)
        : rounds_(key.size() / 2 / 4 + 6), memory_(sizeof(Schedule)), keys_(*new(memory_.bytes().data()) Schedule) {
        const auto half = key.size() / 2;
        expand(key.first(half), keys_.encrypt);
        invert(keys_.encrypt, rounds_, keys_.decrypt);
        expand(key.subspan(half), keys_.tweak);
    }

    void run(Direction direction, SectorNumbers numbers, std::span<const std::byte> from,
             std::byte* to) const override {
        if (direction == Direction::encrypt) {
            run_sectors<Direction::encrypt>(keys_.encrypt, keys_.tweak, rounds_, numbers, from, to);
        } else {
            run_sectors<Direction::decrypt>(keys_.decrypt, keys_.tweak, rounds_, numbers, from, to);
        }
    }

private:
    std::size_t rounds_;
    Secret memory_;
    Schedule& keys_;
};

}  // namespace

std::unique_ptr<const WideXts> WideXts::make(std::span<const std::byte> key) {
    static const bool supported = __builtin_cpu_supports("aes") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("vaes") && __builtin_cpu_supports("vpclmulqdq");
    if (!supported || (key.size() != 32 && key.size() != 48 && key.size() != 64)) return nullptr;
    return std::make_unique<Wide>(key);
}

}  // namespace qcow::crypto

#else

namespace qcow::crypto {

std::unique_ptr<const WideXts> WideXts::make(std::span<const std::byte>) { return nullptr; }

}  // namespace qcow::crypto

#endif
