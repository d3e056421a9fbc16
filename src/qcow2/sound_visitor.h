#pragma once
// A walk over an image in which a check has found nothing wrong.

#include "qcow2/walker.h"

namespace qcow::qcow2 {

/// A flaw is an error: Errc::corrupt. No table is there twice, so it does not remember what is used.
class SoundVisitor : public Visitor {
public:
    /// `metadata` outlives it.
    explicit SoundVisitor(const Metadata& metadata) : metadata_(metadata) {}

    Result<void> flaw(const Flaw& flaw) override;
    [[nodiscard]] std::uint64_t next_used(std::uint64_t, std::uint64_t end) const override { return end; }

protected:
    const Metadata& metadata_;
};

}  // namespace qcow::qcow2
