#include "crypto/cipher.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "base/try.h"
#include "crypto/block.h"
#include "crypto/kdf.h"
#include "crypto/xts.h"
#include "qcow/key.h"
#include "qcow/text.h"

namespace qcow::crypto {
namespace {

constexpr std::size_t max_block_bytes = 16;
constexpr std::uint64_t all_of_32_bits = std::numeric_limits<std::uint32_t>::max();

/// "xts-plain64" or "cbc-essiv:sha256", in its parts.
struct Mode {
    std::string_view chaining;
    std::string_view vectors;
    std::string hash;
};

Mode parse_mode(std::string_view text) {
    Mode mode;
    const auto dash = std::min(text.find('-'), text.size());
    mode.chaining = text.substr(0, dash);
    text.remove_prefix(std::min(dash + 1, text.size()));
    const auto colon = std::min(text.find(':'), text.size());
    mode.vectors = text.substr(0, colon);
    mode.hash = text.substr(std::min(colon + 1, text.size()));
    return mode;
}

std::unique_ptr<BlockCipher> find(std::string_view cipher, std::string_view mode, std::span<const std::byte> key,
                                  Direction direction) {
    auto found = openssl_cipher(cipher, mode, key, direction);
    return found ? std::move(found) : gcrypt_cipher(cipher, mode, key, direction);
}

/// Two ciphers, one after the other.
class Twice final : public BlockCipher {
public:
    Twice(std::unique_ptr<BlockCipher> first, std::unique_ptr<BlockCipher> second)
        : first_(std::move(first)), second_(std::move(second)) {}

    void run(std::span<const std::byte> iv, std::span<std::byte> bytes) override {
        first_->run(iv, bytes);
        second_->run(iv, bytes);
    }

private:
    std::unique_ptr<BlockCipher> first_;
    std::unique_ptr<BlockCipher> second_;
};

class Sectors final : public SectorCipher {
public:
    enum class Vectors : std::uint8_t { none, plain, plain64, essiv };

    Sectors(std::string_view cipher, std::string_view mode, Vectors vectors, std::span<const std::byte> key,
            std::optional<Secret> essiv_key, std::size_t sector_bytes)
        : cipher_(cipher),
          mode_(mode),
          vectors_(vectors),
          block_bytes_(cipher == "cast5" ? 8 : max_block_bytes),
          sector_bytes_(sector_bytes),
          key_(key),
          essiv_key_(std::move(essiv_key)),
          wide_(cipher == "aes" && mode == "xts" && !essiv_key_ ? WideXts::make(key) : nullptr) {}

    /// Whether the libraries have all of it.
    bool verify() const { return give_back(make(Direction::encrypt)) && give_back(make(Direction::decrypt)); }

    [[nodiscard]] std::size_t sector_bytes() const override { return sector_bytes_; }

    void encrypt(std::uint64_t sector, std::span<const std::byte> from, std::span<std::byte> to) const override {
        if (wide_) return wide_->run(Direction::encrypt, numbers(sector), from, to.data());
        if (from.data() != to.data()) std::ranges::copy(from, to.begin());
        run(Direction::encrypt, sector, to.first(from.size()));
    }
    void decrypt(std::uint64_t sector, std::span<std::byte> bytes) const override {
        if (wide_) return wide_->run(Direction::decrypt, numbers(sector), bytes, bytes.data());
        run(Direction::decrypt, sector, bytes);
    }

private:
    /// What one thread at a time works with.
    struct Work {
        Direction direction;
        std::unique_ptr<BlockCipher> data;
        std::unique_ptr<BlockCipher> vectors;  // what encrypts them: for essiv and XTS
    };

    void run(Direction direction, std::uint64_t sector, std::span<std::byte> bytes) const {
        auto work = take(direction);
        if (mode_ == "xts") {
            xts(*work->data, *work->vectors, numbers(sector), bytes);
        } else if (vectors_ == Vectors::none) {
            work->data->run({}, bytes);
        } else {
            for (; !bytes.empty(); bytes = bytes.subspan(sector_bytes_), sector += step()) {
                const auto vector = vector_of(*work, sector);
                work->data->run(std::span(vector).first(block_bytes_), bytes.first(sector_bytes_));
            }
        }
        give_back(std::move(work));
    }

    [[nodiscard]] std::uint64_t step() const { return sector_bytes_ / sector_unit; }
    [[nodiscard]] SectorNumbers numbers(std::uint64_t first) const { return {first, step(), mask(), sector_bytes_}; }

    /// Of the bits of a number that vectors are made of.
    [[nodiscard]] std::uint64_t mask() const { return vectors_ == Vectors::plain ? all_of_32_bits : UINT64_MAX; }

    [[nodiscard]] std::array<std::byte, max_block_bytes> vector_of(const Work& work, std::uint64_t sector) const {
        std::array<std::byte, max_block_bytes> vector = {};
        sector &= mask();
        if constexpr (std::endian::native == std::endian::big) sector = __builtin_bswap64(sector);
        std::memcpy(vector.data(), &sector, sizeof(sector));
        if (work.vectors) work.vectors->run({}, std::span(vector).first(block_bytes_));
        return vector;
    }

    [[nodiscard]] std::unique_ptr<Work> make(Direction direction) const {
        const auto key = key_.bytes();
        const bool is_xts = mode_ == "xts";
        if (is_xts && block_bytes_ != max_block_bytes) return nullptr;
        const auto data_key = is_xts ? key.first(key.size() / 2) : key;
        auto work = std::make_unique<Work>();
        work->direction = direction;
        work->data = find(cipher_, is_xts ? "ecb" : mode_, data_key, direction);
        if (!work->data) return nullptr;
        if (essiv_key_) {
            work->vectors = find(cipher_, "ecb", essiv_key_->bytes(), Direction::encrypt);
            if (!work->vectors) return nullptr;
        }
        if (is_xts) {
            auto tweaks = find(cipher_, "ecb", key.subspan(data_key.size()), Direction::encrypt);
            if (!tweaks) return nullptr;
            work->vectors = work->vectors ? std::make_unique<Twice>(std::move(work->vectors), std::move(tweaks))
                                          : std::move(tweaks);
        }
        return work;
    }

    [[nodiscard]] std::unique_ptr<Work> take(Direction direction) const {
        {
            auto& idle = idle_of(direction);
            const std::lock_guard lock(mutex_);
            if (!idle.empty()) {
                auto work = std::move(idle.back());
                idle.pop_back();
                return work;
            }
        }
        auto work = make(direction);
        if (!work) throw std::bad_alloc();  // verify() has had one
        return work;
    }

    bool give_back(std::unique_ptr<Work> work) const {
        if (!work) return false;
        auto& idle = idle_of(work->direction);
        const std::lock_guard lock(mutex_);
        idle.push_back(std::move(work));
        return true;
    }

    [[nodiscard]] std::vector<std::unique_ptr<Work>>& idle_of(Direction direction) const {
        return idle_[direction == Direction::encrypt ? 1 : 0];
    }

    const std::string cipher_;
    const std::string mode_;
    const Vectors vectors_;
    const std::size_t block_bytes_;
    const std::size_t sector_bytes_;
    const Secret key_;
    const std::optional<Secret> essiv_key_;
    const std::unique_ptr<const WideXts> wide_;  // null: the libraries do it
    mutable std::mutex mutex_;
    mutable std::array<std::vector<std::unique_ptr<Work>>, 2> idle_;
};

/// The bits that keys of a cipher have in this build.
std::vector<std::size_t> key_lengths(std::string_view cipher) {
    std::vector<std::size_t> lengths;
    for (const std::size_t bits : {128, 192, 256}) {
        const std::vector<std::byte> key(bits / 8);
        if (find(cipher, "ecb", key, Direction::encrypt)) lengths.push_back(bits);
    }
    return lengths;
}

}  // namespace

Result<std::shared_ptr<const SectorCipher>> SectorCipher::make(std::string_view cipher, std::string_view mode,
                                                               std::span<const std::byte> key,
                                                               std::size_t sector_bytes) {
    const auto parsed = parse_mode(mode);
    const auto unsupported = [&](std::string_view why) {
        return fail(Errc::unsupported, "encryption",
                    fmt::format("{}-{} with a key of {} bits is not supported; {}", printable(cipher), printable(mode),
                                key.size() * 8, why));
    };
    using enum Sectors::Vectors;
    auto vectors = none;
    std::optional<Secret> essiv_key;
    if (parsed.chaining != "ecb") {
        if (parsed.vectors == "plain") {
            vectors = plain;
        } else if (parsed.vectors == "plain64") {
            vectors = plain64;
        } else if (parsed.vectors == "essiv") {
            vectors = essiv;
            if (parsed.hash.empty()) return unsupported("essiv needs a hash, such as essiv:sha256");
            essiv_key.emplace(TRY(hash_size(parsed.hash)));
            TRY_VOID(digest(parsed.hash, key, essiv_key->bytes()));
        } else {
            return unsupported("the vectors plain, plain64 and essiv are");
        }
    }
    if (parsed.chaining != "xts" && parsed.chaining != "cbc" && parsed.chaining != "ecb")
        return unsupported("the modes xts, cbc and ecb are");
    const auto essiv_key_bits = essiv_key ? essiv_key->bytes().size() * 8 : 0;
    auto made = std::make_shared<Sectors>(cipher, parsed.chaining, vectors, key, std::move(essiv_key), sector_bytes);
    if (made->verify()) return made;
    const auto lengths = key_lengths(cipher);
    if (lengths.empty()) return unsupported(missing_cipher_remedy);
    const bool is_xts = parsed.chaining == "xts";
    if (is_xts && cipher == "cast5") return unsupported("xts needs a cipher with blocks of 128 bits");
    const auto data_bits = key.size() * 8 / (is_xts ? 2 : 1);
    if (vectors == essiv && std::ranges::find(lengths, data_bits) != lengths.end()) {
        return unsupported(
            fmt::format("{} has no key of {} bits, which essiv makes with {}", cipher, essiv_key_bits, parsed.hash));
    }
    return unsupported(fmt::format("{} has keys of {} bits{}", cipher, fmt::join(lengths, ", "),
                                   is_xts ? ", and two of them in xts" : ""));
}

}  // namespace qcow::crypto
