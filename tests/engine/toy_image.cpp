#include "engine/toy_image.h"

#include "base/buffers.h"

namespace qcow::test {

std::string mistake_name(Mistake mistake) {
    static constexpr const char* names[] = {"None",
                                            "FlushSkipped",
                                            "MappingFirst",
                                            "DataLast",
                                            "ReuseBeforeCommit",
                                            "PunchBeforeCommit",
                                            "ReuseWhileInUse",
                                            "LostUpdate"};
    return names[static_cast<std::size_t>(mistake)];
}

void ToyImage::create(Storage& storage) {
    value_of(storage.resize(first_data * block));
    value_of(storage.flush());
}

ToyImage::ToyImage(std::shared_ptr<Storage> storage, Mistake mistake)
    : storage_(std::move(storage)), mistake_(mistake), map_(guest_blocks), counts_(host_blocks), users_(host_blocks) {
    value_of(storage_->read({0}, std::as_writable_bytes(std::span(map_))));
    value_of(storage_->read({block}, std::as_writable_bytes(std::span(counts_))));
    // What nothing maps is free, whatever the counts say.
    for (std::size_t i = 0; i < host_blocks; ++i)
        if (counts_[i] != 0 && std::ranges::find(map_, i) == map_.end()) counts_[i] = 0;
}

Result<Extent> ToyImage::do_extent(GuestOffset at, std::uint64_t limit) {
    const std::lock_guard lock(mutex_);
    const auto host = map_[at.value / block];
    Extent extent{at, std::min(limit, block - at.value % block)};
    if (host == 0) return extent;
    extent.kind = Extent::Kind::data;
    extent.host = HostOffset{host * block + at.value % block};
    extent.storage = storage_.get();
    return extent;
}

Result<void> ToyImage::do_read(GuestOffset at, Buffers to) {
    return each_block(at, to.size(),
                      [&](std::uint64_t guest, std::uint64_t within, std::uint64_t done, std::uint64_t n) {
                          const auto part = to.subspan(done, n);
                          const auto host = use(guest);
                          if (host == 0) {
                              fill_zeros(part);
                              return Result<void>();
                          }
                          const auto read = storage_->read({host * block + within}, part);
                          leave(host);
                          return read ? Result<void>() : std::unexpected(read.error());
                      });
}

Result<void> ToyImage::do_write(GuestOffset at, ConstBuffers from) {
    if (auto usable = verify_usable(); !usable) return usable;
    return each_block(at, from.size(),
                      [&](std::uint64_t guest, std::uint64_t within, std::uint64_t done, std::uint64_t n) {
                          const auto part = from.subspan(done, n);
                          auto host = n == block ? 0 : use(guest);
                          if (host == 0) {
                              if (mistake_ == Mistake::lost_update)
                                  return fill_new_block_alone(guest, within, gathered(part));
                              const std::lock_guard allocating(allocating_);
                              if (n != block) host = use(guest);
                              if (host == 0) return fill_new_block(guest, within, gathered(part));
                          }
                          auto wrote = storage_->write({host * block + within}, part);
                          leave(host);
                          return wrote;
                      });
}

Result<void> ToyImage::do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes) {
    return write(at, Bytes(length));
}

Result<void> ToyImage::do_discard(GuestOffset at, std::uint64_t length) {
    if (auto usable = verify_usable(); !usable) return usable;
    const auto first = (at.value + block - 1) / block;
    for (auto guest = first; (guest + 1) * block <= at.value + length; ++guest) {
        const std::lock_guard lock(mutex_);
        if (auto mapped = map(guest, 0); !mapped) return mapped;
    }
    return {};
}

Result<void> ToyImage::do_flush() {
    if (mistake_ == Mistake::flush_skipped) return {};
    if (auto usable = verify_usable(); !usable) return usable;
    const std::lock_guard lock(mutex_);
    if (auto flushed = flush_storage(); !flushed)
        return mistake_ == Mistake::error_swallowed ? Result<void>() : flushed;
    const auto dropped = std::exchange(dropped_, {});
    for (const auto host : dropped) {
        if (mistake_ != Mistake::reuse_while_in_use && users_[host] != 0) {
            dropped_.push_back(host);  // perhaps with the next flush
            continue;
        }
        counts_[host] = 0;
        if (auto stored = store_count(host); !stored) return stored;
    }
    return {};
}

Result<CheckReport> ToyImage::do_check(const CheckOptions&) {
    CheckReport report;
    Bytes stored(host_blocks);
    value_of(storage_->read({block}, stored));
    std::vector<unsigned> references(host_blocks);
    for (const auto host : map_) {
        if (host == 0) continue;
        if (host < first_data || host >= host_blocks || ++references[host] > std::to_integer<unsigned>(stored[host])) {
            ++report.corruptions;
            report.findings.push_back({CheckFinding::Severity::corruption, fmt::format("block {}", host),
                                       "is used more often than it is counted"});
        }
    }
    return report;
}

std::uint64_t ToyImage::use(std::uint64_t guest) {
    const std::lock_guard lock(mutex_);
    const auto host = map_[guest];
    if (host != 0) ++users_[host];
    return host;
}

void ToyImage::leave(std::uint64_t host) {
    const std::lock_guard lock(mutex_);
    --users_[host];
}

Result<void> ToyImage::fill_new_block_alone(std::uint64_t guest, std::uint64_t within,
                                            std::span<const std::byte> part) {
    std::this_thread::yield();
    const std::lock_guard allocating(allocating_);
    return fill_new_block(guest, within, gathered(part));
}

Result<void> ToyImage::fill_new_block(std::uint64_t guest, std::uint64_t within, std::span<const std::byte> part) {
    std::uint64_t host = first_data;
    {
        const std::lock_guard lock(mutex_);
        while (host < host_blocks && counts_[host] != 0) ++host;
        if (host == host_blocks) return std::unexpected(Error{Errc::no_space, "toy", "no block is free"});
        counts_[host] = 1;
        if (auto stored = store_count(host); !stored) return stored;
    }
    Bytes bytes(block);
    std::ranges::copy(part, bytes.begin() + static_cast<std::ptrdiff_t>(within));
    if (mistake_ == Mistake::data_last || mistake_ == Mistake::mapping_first) {
        if (mistake_ == Mistake::data_last) {
            if (auto flushed = flush_storage(); !flushed) return flushed;
        }
        if (auto wrote = storage_->write({host * block}, bytes); !wrote) return wrote;
    } else {
        if (auto wrote = storage_->write({host * block}, bytes); !wrote) return wrote;
        if (auto flushed = flush_storage(); !flushed) return flushed;
    }
    const std::lock_guard lock(mutex_);
    return map(guest, host);
}

Result<void> ToyImage::map(std::uint64_t guest, std::uint64_t host) {
    const auto before = std::exchange(map_[guest], static_cast<std::uint8_t>(host));
    if (auto stored = store({guest}, std::span(map_).subspan(guest, 1)); !stored) return stored;
    if (before == 0) return {};
    if (mistake_ == Mistake::reuse_before_commit) {
        counts_[before] = 0;
        return {};
    }
    dropped_.push_back(before);
    return mistake_ == Mistake::punch_before_commit ? storage_->write_zeroes({before * block}, block) : Result<void>();
}

Result<void> ToyImage::store(HostOffset at, std::span<const std::uint8_t> bytes) {
    return or_unusable(storage_->write(at, std::as_bytes(bytes)));
}

Result<void> ToyImage::flush_storage() {
    auto flushed = storage_->flush();
    return mistake_ == Mistake::flush_tried_again ? flushed : or_unusable(std::move(flushed));
}

Result<void> ToyImage::or_unusable(Result<void> result) {
    const std::lock_guard lock(usable_mutex_);
    if (!result && usable_) usable_ = result;
    return result;
}

Result<void> ToyImage::verify_usable() {
    const std::lock_guard lock(usable_mutex_);
    return mistake_ == Mistake::error_swallowed ? Result<void>() : usable_;
}

}  // namespace qcow::test
