#pragma once
// Extents of a file, as readers of file systems find them.

#include <algorithm>
#include <optional>
#include <vector>

#include "qcow/filesystem.h"

namespace qcow {

/// Collects the extents of a file, with holes between them.
class FileRuns {
public:
    FileRuns(std::uint64_t at, std::uint64_t size) : begin_(at), end_(at), size_(size) {}
    [[nodiscard]] bool full() const { return runs_.size() >= FileSystem::most_extents || end_ >= size_; }
    /// Returns false if the run lies in front of an extent that came before.
    bool add(std::uint64_t at, std::uint64_t length, std::optional<GuestOffset> stored) {
        if (at < last_) return false;
        last_ = at + length;
        if (last_ <= begin_ || full()) return true;
        if (at < begin_) {
            if (stored) *stored += begin_ - at;
            length -= begin_ - at;
            at = begin_;
        }
        if (at > end_) append(end_, at - end_, {});
        if (full()) return true;
        append(at, std::min(length, size_ - at), stored);
        return true;
    }
    std::vector<FileExtent> finished() && {
        if (!full() && end_ < size_) append(end_, size_ - end_, {});
        return std::move(runs_);
    }

private:
    void append(std::uint64_t at, std::uint64_t length, std::optional<GuestOffset> stored) {
        end_ = at + length;
        if (!runs_.empty()) {
            auto& last = runs_.back();
            const bool continues =
                last.stored && stored ? *last.stored + last.length == *stored : !last.stored && !stored;
            if (continues) {
                last.length += length;
                return;
            }
        }
        runs_.push_back({at, length, stored});
    }
    std::uint64_t begin_;
    std::uint64_t end_;
    std::uint64_t size_;
    std::uint64_t last_ = 0;
    std::vector<FileExtent> runs_;
};

}  // namespace qcow
