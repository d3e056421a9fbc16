#include "qcow2/metadata/write_back.h"

#include <algorithm>
#include <array>

#include "base/try.h"

namespace qcow::qcow2 {
namespace {

using PageClass = WordCache::PageClass;

constexpr std::size_t batch_pages = 256;  // bounds the memory for copies of pages: 1 MiB

}  // namespace

std::unexpected<Error> WriteBack::stop(Error why) {
    const std::lock_guard lock(stop_mutex_);
    // First of all: if memory has run out, there is none for the reason either.
    if (!stopped_.exchange(true)) why_ = why;
    return std::unexpected(std::move(why));
}

Result<void> WriteBack::why_stopped() const {
    const std::lock_guard lock(stop_mutex_);
    auto why = why_;
    why.what += "; writing has stopped: open the image again";
    return std::unexpected(std::move(why));
}

Result<void> WriteBack::store(HostOffset at, std::span<const std::uint64_t> words, PageClass page_class, bool barrier) {
    while (!TRY(metadata_.words().store(at, words, page_class, barrier))) TRY_VOID(write_all());
    return {};
}

Result<void> WriteBack::write_pages(std::span<const WordCache::Changed> pages, PageClass page_class) {
    std::vector<std::byte> joined;
    auto result = [&]() -> Result<void> {
        for (std::size_t i = 0; i < pages.size();) {
            joined.clear();
            const HostOffset at = pages[i].at;
            for (; i < pages.size() && pages[i].at == at + joined.size(); ++i)
                joined.insert(joined.end(), pages[i].bytes.begin(), pages[i].bytes.end());
            TRY_VOID(metadata_.file().write(at, joined));
        }
        return {};
    }();
    metadata_.words().written(pages, page_class, result.has_value());
    return result;
}

Result<void> WriteBack::write_refcounts() {
    const std::lock_guard lock(refcount_mutex_);
    return attempt([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        for (auto left = metadata_.words().changed_count(refcount_pages); left > 0;) {
            const auto count = std::min(left, batch_pages);
            TRY_VOID(write_pages(metadata_.words().take_changed(refcount_pages, count), refcount_pages));
            left -= count;
        }
        return {};
    });
}

void WriteBack::record_in(SurvivingMemory memory) {
    const std::lock_guard lock(mapping_mutex_);
    metadata_.words().record_in(std::make_unique<RedoLog>(std::move(memory)), mapping_pages);
}

Result<void> WriteBack::write_all() {
    // Who waits here must not find that nothing is changed, where memory ran out with pages in hand.
    const std::lock_guard lock(mapping_mutex_);
    return attempt([&]() -> Result<void> {
        TRY_VOID(verify_writable());
        auto* log = metadata_.words().log_of(mapping_pages);
        if (log != nullptr) log->begin_writing();
        // Not what others change meanwhile, or they could keep this one here for ever.
        auto left = metadata_.words().changed_count(mapping_pages);
        do {
            // Copied first: what the copies refer to was written or counted before they were made, so that what is
            // written and flushed now covers it.
            const auto count = std::min(left, batch_pages);
            const auto pages = metadata_.words().take_changed(mapping_pages, count);
            left -= count;
            auto ready = write_refcounts();
            const bool barrier = std::ranges::any_of(pages, &WordCache::Changed::barrier);
            if (ready && barrier) ready = sync();
            if (!ready) {
                metadata_.words().written(pages, mapping_pages, false);
                return ready;
            }
            TRY_VOID(write_pages(pages, mapping_pages));
        } while (left > 0);
        if (log != nullptr) log->end_writing();
        return {};
    });
}

Result<void> WriteBack::sync() {
    TRY_VOID(verify_writable());
    if (!flushes_) return {};
    auto result = data_file_ != nullptr ? data_file_->flush() : Result<void>();
    if (result) result = metadata_.file().flush();
    if (result) return {};
    // The system may have dropped what it could not write, and will not say so again.
    auto error = std::move(result).error();
    error.what += "; what was written since the last flush may be lost";
    return stop(std::move(error));
}

Result<void> WriteBack::update_header(const std::function<void(format::HeaderState&)>& change) {
    const std::lock_guard lock(header_mutex_);
    auto header = metadata_.state();
    change(header);
    std::array<std::byte, 512> sector;
    TRY(metadata_.file().read({0}, sector));
    format::update_header(sector, metadata_.header().version, header);
    // Which of the two the file has can no longer be told.
    if (auto wrote = metadata_.file().write({0}, sector); !wrote) return stop(std::move(wrote).error());
    metadata_.replace_state(header);
    return {};
}

Result<void> WriteBack::edit_header(const std::function<void(format::HeaderEdit&, format::HeaderState&)>& edit) {
    const std::lock_guard lock(header_mutex_);
    std::vector<std::byte> cluster(metadata_.cluster_size());
    cluster.resize(TRY(metadata_.file().read({0}, cluster)));
    format::HeaderEdit edited(cluster);
    auto state = metadata_.state();
    edit(edited, state);
    edited.set_state(state);
    for (const auto& step : TRY(edited.steps())) {
        if (auto wrote = metadata_.file().write({0}, step); !wrote) return stop(std::move(wrote).error());
        TRY_VOID(sync());
    }
    metadata_.replace_state(state);
    return {};
}

std::unexpected<Error> WriteBack::declare_corrupt(const std::string& place, const std::string& what) {
    return declare_corrupt(Error{Errc::corrupt, metadata_.file().name() + ": " + place, what});
}

std::unexpected<Error> WriteBack::declare_corrupt(Error damage, std::string_view remedy) {
    // Version 2 has no such mark.
    damage.what +=
        metadata_.header().version >= 3 ? "; the image is marked as corrupt: " : "; it is not written any more: ";
    damage.what += remedy;
    if (metadata_.header().version >= 3 && !stopped_) {
        // If this fails, too, the image is at least not written any more.
        if (update_header([](format::HeaderState& header) { header.incompatible |= format::incompatible::corrupt; }))
            static_cast<void>(sync());
    }
    return stop(std::move(damage));
}

}  // namespace qcow::qcow2
