#include "qcow/digest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <optional>
#include <span>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/page_memory.h"
#include "disk/padded.h"
#include "operation/in_order.h"
#include "operation/runs.h"
#include "qcow/image.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// The unit that is hashed. Another one would give other digests.
constexpr std::uint64_t block_bytes = 64 * KiB;

/// Small enough that what was read is still in the processor's cache when it is hashed.
constexpr std::uint64_t min_digested_bytes = 256 * KiB;

/// Blocks of a piece that is not read. A request to stop waits for it.
constexpr std::uint64_t max_zero_blocks = 16384;

/// Hashes that are hashed in one call.
constexpr std::uint64_t many = 1024;

using Bytes = std::span<const std::byte>;

/// OpenSSL's functions fail here for want of memory alone.
void verify(int succeeded) {
    if (succeeded != 1) throw std::bad_alloc();
}

/// A hash function. Thread-safe.
class Algorithm {
public:
    static Result<Algorithm> find(const std::string& name) {
        Algorithm found;
        found.method_.reset(EVP_MD_fetch(nullptr, name.c_str(), nullptr), EVP_MD_free);
        if (!found.method_) {
            return fail(Errc::invalid_argument, printable(name),
                        "OpenSSL has no such hash function; openssl list -digest-algorithms shows those that it has");
        }
        if ((EVP_MD_get_flags(found.method_.get()) & EVP_MD_FLAG_XOF) != 0) {
            return fail(Errc::invalid_argument, printable(name),
                        "its digests have no fixed length; choose another one");
        }
        if (found.size() == 0)
            return fail(Errc::invalid_argument, printable(name), "its digests are empty; choose another one");
        return found;
    }

    [[nodiscard]] const EVP_MD* method() const { return method_.get(); }
    [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(EVP_MD_get_size(method_.get())); }

private:
    std::shared_ptr<EVP_MD> method_;
};

/// A hash that is being computed. Not thread-safe.
class Hash {
public:
    explicit Hash(const Algorithm& algorithm) : size_(algorithm.size()), context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_) throw std::bad_alloc();
        verify(EVP_DigestInit_ex2(context_.get(), algorithm.method(), nullptr));
    }

    void add(Bytes bytes) { verify(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size())); }

    /// Appends the digest of what was added to `digests`, and begins again.
    void finish(std::vector<std::byte>& digests) {
        digests.resize(digests.size() + size_);
        auto* to = reinterpret_cast<unsigned char*>(digests.data() + digests.size() - size_);
        verify(EVP_DigestFinal_ex(context_.get(), to, nullptr));
        verify(EVP_DigestInit_ex2(context_.get(), nullptr, nullptr));
    }

private:
    std::size_t size_;
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

/// Hands out whole blocks in guest order, and hashes their hashes in the same order.
class Digester {
public:
    struct Piece {
        GuestRange range;
        bool zeros = false;
    };

    struct Memory {
        std::optional<Hash> hash;
        PageMemory bytes;
    };

    struct Hashes {
        std::uint64_t length = 0;  // bytes of the piece
        std::vector<std::byte> hashes = {};
        std::uint64_t zero_blocks = 0;  // instead of `hashes`
    };

    Digester(Disk& disk, const Algorithm& algorithm, const DigestOptions& options)
        : disk_(padded(disk, rounded_size(disk.size()))),
          size_(disk_->size()),
          piece_bytes_(std::max(min_digested_bytes, disk.block_size())),
          runs_(*disk_),
          algorithm_(algorithm),
          options_(options),
          outer_(algorithm) {
        Hash hash(algorithm);
        hash.add(std::vector<std::byte>(block_bytes));
        hash.finish(zero_hash_);
        for (std::size_t i = 0; i < many; ++i)
            zero_hashes_.insert(zero_hashes_.end(), zero_hash_.begin(), zero_hash_.end());
    }

    Result<std::vector<std::byte>> run() {
        TRY_VOID(disk_->read({0}, {}));  // what cannot be read has no contents, not even where nothing is stored
        TRY_VOID(run_in_order(options_.workers == 0 ? default_workers() : options_.workers, *this));
        std::array<std::byte, 8> size;
        for (unsigned i = 0; i < size.size(); ++i) size[i] = static_cast<std::byte>(size_ >> (8 * i));
        outer_.add(size);
        std::vector<std::byte> digest;
        outer_.finish(digest);
        return digest;
    }

    Result<std::optional<Piece>> next() {
        TRY_VOID(verify_goes_on(options_.control));
        if (cursor_.value == size_) return std::nullopt;
        const GuestOffset begin = cursor_;
        const std::uint64_t blocks = TRY(zero_blocks_at(cursor_));
        if (blocks != 0) {
            cursor_ += std::min(blocks, max_zero_blocks) * block_bytes;
            return Piece{{begin, cursor_ - begin}, true};
        }
        const std::uint64_t end = std::min(align_down(begin.value, piece_bytes_) + piece_bytes_, size_);
        do {
            cursor_ = {std::min(cursor_.value + block_bytes, end)};
        } while (cursor_.value < end && TRY(zero_blocks_at(cursor_)) == 0);
        return Piece{{begin, cursor_ - begin}};
    }

    Result<Hashes> perform(const Piece& piece, Memory& memory) const {
        Hashes result{.length = piece.range.length};
        if (piece.zeros) {
            result.zero_blocks = piece.range.length / block_bytes;
            return result;
        }
        if (!memory.hash) memory.hash.emplace(algorithm_);
        if (!memory.bytes) memory.bytes = PageMemory(piece_bytes_);
        const std::span bytes(memory.bytes.data(), piece.range.length);
        TRY_VOID(disk_->read(piece.range.start, bytes));
        for (std::size_t begin = 0; begin < bytes.size(); begin += block_bytes) {
            const auto block = bytes.subspan(begin, std::min<std::size_t>(block_bytes, bytes.size() - begin));
            if (block.size() == block_bytes && is_zero(block)) {
                result.hashes.insert(result.hashes.end(), zero_hash_.begin(), zero_hash_.end());
            } else {
                memory.hash->add(block);
                memory.hash->finish(result.hashes);
            }
        }
        return result;
    }

    Result<bool> settle(Result<Hashes> result) {
        auto hashes = TRY(std::move(result));
        outer_.add(hashes.hashes);
        while (hashes.zero_blocks != 0) {
            const auto now = std::min(hashes.zero_blocks, many);
            outer_.add(Bytes(zero_hashes_).first(now * zero_hash_.size()));
            hashes.zero_blocks -= now;
        }
        done_ += hashes.length;
        if (options_.control.progress) options_.control.progress(done_, size_);
        return true;
    }

private:
    /// How many whole blocks of zeros are known to begin at `at`.
    Result<std::uint64_t> zero_blocks_at(GuestOffset at) {
        const auto run = TRY(runs_.at(at));
        return run.zeros ? run.extent.length / block_bytes : 0;
    }

    std::shared_ptr<Disk> disk_;  // in whole sectors
    const std::uint64_t size_;
    const std::uint64_t piece_bytes_;
    Runs runs_;
    const Algorithm& algorithm_;
    const DigestOptions& options_;
    std::vector<std::byte> zero_hash_;    // of a block of zeros
    std::vector<std::byte> zero_hashes_;  // `many` of them

    GuestOffset cursor_;
    Hash outer_;
    std::uint64_t done_ = 0;
};

}  // namespace

Result<std::size_t> digest_size(const std::string& algorithm) {
    return within_memory([&]() -> Result<std::size_t> { return TRY(Algorithm::find(algorithm)).size(); });
}

Result<std::vector<std::byte>> digest_disk(Disk& disk, const DigestOptions& options) {
    return within_memory([&]() -> Result<std::vector<std::byte>> {
        const auto algorithm = TRY(Algorithm::find(options.algorithm));
        return Digester(disk, algorithm, options).run();
    });
}

Result<DigestResult> digest(const DigestJob& job, const DigestOptions& options) {
    return within_memory([&]() -> Result<DigestResult> {
        const auto image = TRY(open_image(job.image, options.control.warn));
        std::shared_ptr<Disk> disk = image;
        if (!job.snapshot.empty()) disk = TRY(image->snapshots().open(job.snapshot));
        return DigestResult{image->format(), rounded_size(disk->size()), TRY(digest_disk(*disk, options))};
    });
}

}  // namespace qcow
