#pragma once
// Buffers: the memory that a request reads into or writes from, in one piece or in many.

#include <concepts>
#include <cstddef>
#include <iterator>
#include <span>

namespace qcow {

/// A list of pieces of memory, in the order of the bytes of a request: a scatter/gather list. A span, vector or array
/// of bytes converts to a list of one piece.
///
/// It is a view, and cheap to copy. The memory must outlive it, and so must the list that it was made from.
template <class Byte>
class BasicBuffers {
public:
    using Piece = std::span<Byte>;

    constexpr BasicBuffers() = default;
    constexpr BasicBuffers(Byte* data, std::size_t size) : front_(data, size), size_(size) {}
    template <class Bytes>
        requires requires(Bytes&& bytes) {
            { std::data(bytes) } -> std::convertible_to<Byte*>;
            { std::size(bytes) } -> std::convertible_to<std::size_t>;
        }
    constexpr BasicBuffers(Bytes&& bytes) : BasicBuffers(std::data(bytes), std::size(bytes)) {}
    explicit constexpr BasicBuffers(std::span<const Piece> pieces) : rest_(pieces) {
        for (const auto& piece : pieces) size_ += piece.size();
        skip(0);
    }

    /// Bytes in all pieces.
    [[nodiscard]] constexpr std::size_t size() const { return size_; }
    [[nodiscard]] constexpr bool empty() const { return size_ == 0; }

    /// The first piece. It is empty only where the whole list is.
    [[nodiscard]] constexpr Piece front() const { return front_.size() <= size_ ? front_ : front_.first(size_); }
    /// Whether all bytes lie in the first piece.
    [[nodiscard]] constexpr bool contiguous() const { return front_.size() >= size_; }

    /// The first `bytes` bytes (<= size()).
    [[nodiscard]] constexpr BasicBuffers first(std::size_t bytes) const {
        BasicBuffers result = *this;
        result.size_ = bytes;
        return result;
    }
    /// Everything behind the first `bytes` bytes (<= size()).
    [[nodiscard]] constexpr BasicBuffers subspan(std::size_t bytes) const {
        BasicBuffers result = *this;
        result.skip(bytes);
        return result;
    }
    [[nodiscard]] constexpr BasicBuffers subspan(std::size_t bytes, std::size_t length) const {
        return subspan(bytes).first(length);
    }

    // Iteration over the pieces, each a Piece that is not empty.

    class Iterator {
    public:
        explicit constexpr Iterator(const BasicBuffers& left) : left_(left) {}
        constexpr Piece operator*() const { return left_.front(); }
        constexpr Iterator& operator++() {
            left_.skip(left_.front().size());
            return *this;
        }
        constexpr bool operator==(std::default_sentinel_t) const { return left_.empty(); }

    private:
        BasicBuffers left_;
    };
    [[nodiscard]] constexpr Iterator begin() const { return Iterator(*this); }
    [[nodiscard]] constexpr std::default_sentinel_t end() const { return {}; }

private:
    constexpr void skip(std::size_t bytes) {
        size_ -= bytes;
        while (bytes >= front_.size() && !rest_.empty()) {
            bytes -= front_.size();
            front_ = rest_.front();
            rest_ = rest_.subspan(1);
        }
        front_ = front_.subspan(bytes);
    }

    Piece front_;                  // what follows `size_` bytes does not belong to the list
    std::span<const Piece> rest_;  // behind it
    std::size_t size_ = 0;
};

/// Memory to read into.
using Buffers = BasicBuffers<std::byte>;
/// Memory to write from.
using ConstBuffers = BasicBuffers<const std::byte>;

}  // namespace qcow
