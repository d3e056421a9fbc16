#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace qcow {

/// Memory that begins with a page. The kernel copies pages of a file there nearly twice as fast as elsewhere.
class PageMemory {
public:
    PageMemory() = default;
    explicit PageMemory(std::size_t bytes) : bytes_(static_cast<std::byte*>(operator new(bytes, page))) {}

    explicit operator bool() const { return bytes_ != nullptr; }
    [[nodiscard]] std::byte* data() const { return bytes_.get(); }

private:
    static constexpr std::align_val_t page{4096};
    struct Delete {
        void operator()(std::byte* bytes) const { operator delete(bytes, page); }
    };
    std::unique_ptr<std::byte, Delete> bytes_;
};

}  // namespace qcow
