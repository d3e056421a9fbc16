#pragma once
// Holding the requests that change an image, for a moment between them.

#include <string>
#include <utility>

#include "base/request_gate.h"
#include "qcow/error.h"

namespace qcow::qcow2 {

/// Keeps a gate closed until the end of its life. No request that passes the gate runs meanwhile.
class HeldRequests {
public:
    /// Errors: Errc::io: a request did not end for a minute. `file` names the image in the message.
    static Result<HeldRequests> hold(RequestGate& gate, const std::string& file);

    HeldRequests(HeldRequests&& other) noexcept : gate_(std::exchange(other.gate_, nullptr)) {}
    HeldRequests& operator=(HeldRequests&&) = delete;
    ~HeldRequests() {
        if (gate_ != nullptr) gate_->open();
    }

private:
    explicit HeldRequests(RequestGate& gate) : gate_(&gate) {}

    RequestGate* gate_;
};

}  // namespace qcow::qcow2
